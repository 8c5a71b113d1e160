"""The processes of one machine and of several, and what they share."""

from language import Drawing


FILES = (
    "recipe.toml",
    "environment.json",
    "metrics.jsonl",
    "events.jsonl",
    "logs/",
    "checkpoints/",
    "model.safetensors",
    "result.json",
    "report.html",
)


def draw() -> str:
    """Return docs/architecture.svg."""
    drawing = Drawing(
        936,
        "On one machine the supervisor asks a fork server for workers, which exchange "
        "through shared memory; it keeps the run directory. On several machines "
        "torchrun starts the workers, which sum in shared memory first and then "
        "between the machines.",
    )
    drawing.text(24, 38, "On one machine", "ink b big", "start")
    _processes(drawing)
    _memory(drawing)
    _run_directory(drawing)
    drawing.path("M24 556H536", "s-rule")
    drawing.text(24, 592, "On several machines", "ink b big", "start")
    for at in range(3):
        _machine(drawing, at, 24 + 176 * at)
    _between(drawing)
    return drawing.svg()


def _processes(drawing: Drawing) -> None:
    drawing.box(24, 54, 304, 98, "soft s-rule")
    drawing.lines(
        40,
        80,
        "supervisor",
        "samestep train: watches, restarts,",
        "writes checkpoints and records;",
        "never imports torch",
    )
    drawing.arrow("M176 152V173", (176, 181), "down", "line")
    drawing.box(24, 182, 304, 62, "soft s-rule")
    drawing.lines(40, 208, "fork server", "imported torch once; forks in 20 ms")
    for worker in range(3):
        x, kind = 24 + 104 * worker, f"w{worker}"
        drawing.arrow(f"M{x + 48} 244V265", (x + 48, 273), "down", "line")
        drawing.box(x, 274, 96, 94, f"tint{worker} s-{kind}")
        drawing.pill(x + 5, 280, 86, f"worker {worker}", kind)
        drawing.text(x + 48, 335, "its micro-", "ink small")
        drawing.text(x + 48, 354, "batches", "ink small")
        drawing.path(f"M{x + 48} 378V402", f"edge s-{kind}")
        drawing.head((x + 48, 369), "up", kind)
        drawing.head((x + 48, 411), "down", kind)


def _memory(drawing: Drawing) -> None:
    """Draw the memory; snapshots outlive the workers."""
    drawing.box(24, 412, 304, 120, "soft s-rule")
    drawing.lines(40, 438, "shared memory", "partial sums of the gradients; one")
    drawing.text(40, 478, "copy of weights and their state,", "muted small", "start")
    drawing.text(40, 497, "a slice for each to update:", "muted small", "start")
    for worker in range(3):
        drawing.box(40 + 92 * worker, 508, 88, 12, f"w{worker}", radius=4)
    drawing.box(356, 412, 180, 120, "soft s-rule")
    drawing.lines(
        370, 438, "snapshots", "every 0.5 s, in", "memory that outlives", "the workers"
    )
    drawing.arrow("M328 472H347", (355, 472), "right", "line")
    drawing.arrow("M446 412V377", (446, 369), "up", "line")


def _run_directory(drawing: Drawing) -> None:
    drawing.box(356, 54, 180, 314, "soft s-rule")
    drawing.lines(370, 80, "run directory")
    for at, name in enumerate(FILES):
        drawing.text(370, 112 + 27 * at, name, "ink mono", "start")
    drawing.arrow("M328 104H347", (355, 104), "right", "line")


def _machine(drawing: Drawing, at: int, x: int) -> None:
    """Draw a machine in the colour of its workers; its leader has a ring."""
    kind = f"w{at}"
    drawing.box(x, 608, 160, 222, f"tint{at} s-{kind}")
    drawing.text(x + 80, 634, f"machine {at}", "ink b")
    drawing.box(x + 16, 646, 128, 30, "paper s-rule", radius=15)
    drawing.text(x + 80, 666, "torchrun", "muted")
    for worker in range(2):
        left = x + 50 + 60 * worker
        drawing.path(f"M{left} 676V738", f"edge s-{kind}")
        drawing.circle(left, 707, 15, kind)
        drawing.text(left, 712.5, str(2 * at + worker), "on b")
    drawing.circle(x + 50, 707, 19, f"none edge s-{kind}")
    drawing.box(x + 12, 738, 136, 30, kind, radius=4)
    drawing.text(x + 80, 758, "shared memory", "on small")
    drawing.box(x + 12, 780, 136, 34, "paper s-rule")
    drawing.text(x + 80, 802, "run directory", "ink small")


def _between(drawing: Drawing) -> None:
    for at in range(3):
        x = 104 + 176 * at
        drawing.path(f"M{x} 838V850", f"edge s-w{at}")
        drawing.head((x, 831), "up", f"w{at}")
        drawing.head((x, 859), "down", f"w{at}")
    drawing.box(24, 860, 512, 32, "grey", radius=4)
    drawing.text(280, 881, "sums in the order of the tree, over Gloo", "on b")
    drawing.text(
        280,
        916,
        "Ringed workers exchange; each machine has the whole state.",
        "muted small",
    )
