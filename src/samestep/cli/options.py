"""Options that several commands share: everything that does not change a result."""

from collections.abc import Callable
from typing import Any

import click

from samestep.errors import UsageError


class WorkersType(click.ParamType[int | str]):
    """A positive number, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """The number, or the string `auto`."""
        if value == "auto" or (str(value).isdecimal() and int(value) > 0):
            return "auto" if value == "auto" else int(value)
        return self.fail(
            f"workers are a positive number or `auto`; received `{value}`."
        )


class BalanceType(click.ParamType[str | tuple[int, ...]]):
    """A list of numbers, or a word."""

    name = "auto|off|N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> str | tuple[int, ...]:
        """The numbers, or the word."""
        if value in ("auto", "off", "random"):
            return str(value)
        parts = str(value).split(",")
        if all(part.isdecimal() for part in parts):
            return tuple(int(part) for part in parts)
        return self.fail(
            "a balance is `auto`, `off`, or a number of micro-batches for each worker, "
            f"such as `5,3`; received `{value}`."
        )


workers_option = click.option(
    "--workers",
    type=WorkersType(),
    default="auto",
    help="Processes that compute; auto: one per physical core that may be used.",
)

device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "auto", "cuda"]),
    default="cpu",
    help="What to compute on; a GPU has other bits than a CPU. Untested on a GPU.",
)

tracker_option = click.option(
    "--tracker",
    "trackers",
    multiple=True,
    metavar="module:function",
    help="Call this function with every record of metrics.jsonl; repeatable. It is "
    "your code that runs: the module is imported, if need be from the current "
    "directory, which is on Python's path for this import only.",
)

_OWN = [
    click.option(
        f"--{part}",
        metavar="module:function",
        help=f"{what} It is imported, if need be from the current directory.",
    )
    for part, what in (
        ("model", "Your own model: a function that returns a torch.nn.Module."),
        ("data", "Your own data: a function that returns the samples."),
        ("loss", "Your own loss, or a name such as squared-error."),
    )
]


def model_and_data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Code of the user's own that a model needs to be built, and its samples."""
    for option in reversed(_OWN[:2]):
        command = option(command)
    return command


def own_options(command: Callable[..., None]) -> Callable[..., None]:
    """Code of the user's own; see docs/own-code.md."""
    for option in reversed(_OWN):
        command = option(command)
    return command


_RECIPE = [
    click.option("--epochs", type=int, help="Passes over the training samples."),
    click.option("--global-batch", type=int, help="Samples of one optimizer step."),
    click.option("--micro-batches", type=int, help="Pieces of a global batch."),
    click.option("--seed", type=int, help="Seed of weights, order and dropout."),
    click.option(
        "--skip-bad",
        is_flag=True,
        help="Go on without images that cannot be read; they are named and counted.",
    ),
]


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """The fields of a recipe that are asked for most."""
    for option in reversed(_RECIPE):
        command = option(command)
    return command


report_option = click.option(
    "--report/--no-report",
    "with_report",
    default=True,
    help="Write report.html at the end, if its libraries are installed (default).",
)

_PLACEMENT = [
    workers_option,
    device_option,
    click.option(
        "--exchange",
        type=click.Choice(["auto", "shared", "gloo", "nccl"]),
        default="auto",
        help="How the workers' gradients become one sum; auto: shared if possible, "
        "nccl between GPUs.",
    ),
    click.option(
        "--balance",
        type=BalanceType(),
        default="auto",
        help="Micro-batches per worker: by measured speed (auto), evenly (off), or "
        "as given, such as 5,3.",
    ),
    click.option(
        "--evict-slower-than",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        help="Go on without a worker below this share of the others' speed.",
    ),
    click.option(
        "--tensorboard/--no-tensorboard",
        default=None,
        help="Write TensorBoard events; default: if tensorboardX is installed.",
    ),
    click.option(
        "--min-workers",
        type=click.IntRange(1),
        help="Go on with as few as this after the machine lost cores or memory.",
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(0),
        default=3,
        show_default=True,
        help="How often to start again without getting further in between.",
    ),
    click.option(
        "--hang-timeout",
        type=click.FloatRange(0, min_open=True),
        default=60.0,
        show_default=True,
        help="Seconds without any progress after which a worker counts as dead, from "
        "the first step on.",
    ),
    click.option(
        "--start-timeout",
        type=click.FloatRange(0, min_open=True),
        default=1800.0,
        show_default=True,
        help="The same before the first step: to load the data, to build the model, to "
        "compile it.",
    ),
    click.option(
        "--checkpoint-seconds",
        type=click.FloatRange(0),
        default=30.0,
        show_default=True,
        help="Between checkpoints on disk, besides those at the end of an epoch.",
    ),
    click.option(
        "--snapshot-seconds",
        type=click.FloatRange(0),
        default=0.5,
        show_default=True,
        help="Between snapshots in memory; 0: none, nor checkpoints but the last.",
    ),
    click.option(
        "--prefetch",
        type=click.Choice(["auto", "off"]),
        default="auto",
        help="Draw samples in the background if that takes more than 10% of a step.",
    ),
    click.option(
        "--probe/--no-probe",
        default=True,
        help="With own code: compute one micro-batch of each epoch again, elsewhere, "
        "and compare (default).",
    ),
    click.option(
        "--profile",
        type=click.IntRange(0, 1000),
        default=0,
        metavar="N",
        help="Write trace.json: N steps of all workers, for Perfetto.",
    ),
]


def placement_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where and with what a training runs: the fields of `samestep.Placement`."""
    for option in reversed(_PLACEMENT):
        command = option(command)
    return command


class NodesType(click.ParamType[str]):
    """`N` or `MIN:MAX`."""

    name = "N|MIN:MAX"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The same text."""
        least, _, most = str(value).partition(":")
        numbers = [part for part in (least, most or least) if part.isdecimal()]
        if len(numbers) == 2 and 0 < int(least) <= int(most or least):
            return str(value)
        return self.fail(
            "machines are a number, or the fewest and the most, such as `1:4`; "
            f"received `{value}`."
        )


interface_option = click.option(
    "--interface",
    metavar="NAME|ADDRESS|NETWORK",
    help="The network interface between machines; a network, such as 10.0.0.0/24, lets "
    "the same command run on all of them.",
)

_NODES = [
    click.option(
        "--nodes",
        type=NodesType(),
        help="Train on this many machines with torchrun; give this command on each. "
        "MIN:MAX: go on while MIN are there. `--workers` are per machine then.",
    ),
    click.option(
        "--endpoint",
        metavar="HOST:PORT",
        help="With --nodes: one of the machines and a free port, where all meet.",
    ),
    click.option(
        "--rdzv-id",
        metavar="NAME",
        help="With --nodes: the job's name, the same on all machines, where several "
        "jobs meet at one endpoint; `samestep` by default.",
    ),
    interface_option,
]


def nodes_options(command: Callable[..., None]) -> Callable[..., None]:
    """More than one machine; see docs/several-machines.md."""
    for option in reversed(_NODES):
        command = option(command)
    return command


def are_nodes_asked_for(
    nodes: str | None,
    endpoint: str | None,
    interface: str | None,
    rdzv_id: str | None = None,
) -> bool:
    """All of these options or none. Raises UsageError."""
    given = {"--nodes": nodes, "--endpoint": endpoint, "--interface": interface}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UsageError(
            "Several machines need `--nodes`, `--endpoint` and `--interface`; missing: "
            f"{', '.join(missing)}. For one machine, leave out all three."
        )
    if missing and rdzv_id is not None:
        raise UsageError(
            f"`--rdzv-id` is for several machines; received `{rdzv_id}` without "
            "`--nodes`. Leave it out, or add `--nodes`, `--endpoint` and `--interface`."
        )
    return not missing
