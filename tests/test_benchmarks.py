"""Every script in benchmarks/ runs, and leaves nothing behind, also after SIGTERM.

Each runs in its smallest setting; what it measures is not checked.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import compare
import pytest
import torch
from common import Task, in_memory, shapes
from documents import PAGES, ROOT, commands
from gpu import __main__ as gpu_run
from gpu import parts as gpu_parts
from gpu.report import Report
from hosts import why_not
from processes import marked, started_by
from quota import V1, V2
from test_launch import wait_until

from samestep import Recipe, models
from samestep.data import dataset


SMALL = ("--set", "data.train_samples=1000")
TWO_EPOCHS = ("--rounds", "1", "--epochs", "2", "--set", "data.train_samples=2000")
"""For mnist-mlp-classic: in fewer steps the order of samples decides the accuracy."""
SMALLEST = {
    "accuracy.py": ("--inputs", "1000"),
    "agreement.py": ("--blocks", "1", "--epochs", "1", "--seconds", "0.1", *SMALL),
    "balance.py": ("half", "--rounds", "1", "--pace", "0.05"),
    "cold_start.py": ("lstm", "--rounds", "1", "--workers", "2"),
    "compare.py": (
        *("mnist-mlp-classic", "samestep-1-whole", "plain-1"),
        *("samestep-2-halves", "ddp-2", "loop-2", *TWO_EPOCHS),
    ),
    "dilated.py": (
        *("--rounds", "1", "--seconds", "0.01", "--warm-up", "0.01", "--samples", "4"),
    ),
    "faults.py": ("--faults", "8", "--trainings", "1", "--segments", "1"),
    "integrations.py": ("accelerate", "--rounds", "1", "--epochs", "2"),
    "nodes.py": ("throughput", "--rounds", "1", "--seconds", "0.5"),
    "own_module.py": (
        *("--rounds", "1", "--epochs", "2", "--samples", "512", "--workers", "2"),
    ),
    "lost_hosts.py": ("--faults", "2"),
    "overlap.py": ("--width", "64", "--rounds", "2"),
    "ledger.py": ("--pairs", "1", "--steps", "5"),
    "phases.py": ("--pairs", "1", "--steps", "5"),
    "placements.py": ("--runs", "2"),
    "records.py": ("mnist-98", "--seeds", "1"),
    "recovery.py": ("worker-killed",),
    "roofline.py": ("--rounds", "1"),
    "safety.py": ("--rounds", "1", "--epochs", "1", *SMALL),
    "seeds.py": ("mnist-mlp", "--seeds", "1", *SMALL),
    "streams.py": ("state", "--kills", "1", "--samples", "403"),
    "tax.py": ("--rounds", "1", "--epochs", "2", "--samples", "1000"),
    "verify.py": ("found", "--share", "0.3", *SMALL),
    "wire.py": ("2", "--rounds", "1"),
}
SAVING = dict.fromkeys(("compare.py", "records.py"), "--save") | dict.fromkeys(
    ("dilated.py", "nodes.py", "recovery.py"), "--out"
)
"""The option that says where."""
AS_ROOT = {
    *("dilated.py", "lost_hosts.py", "nodes.py", "overlap.py", "recovery.py"),
    "wire.py",
}
LONG = {"lost_hosts.py"}
"""They are tried with the tests that are `full` only."""
LIBRARIES = {
    *("cleanup.py", "forging.py", "hosts.py", "layer_passes.py", "planting.py"),
    "quota.py",
}
needs_root = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def start(script: str, home: Path, *options: str) -> subprocess.Popen[str]:
    """Start a script; `home` is for its temporary files."""
    (home / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**marked(home), "TMPDIR": str(home / "tmp")},
        start_new_session=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    printed, errors = process.communicate(timeout=280)
    assert process.returncode == 0, printed + errors
    return printed


def assert_nothing_is_left(script: subprocess.Popen[str], home: Path) -> None:
    assert list(started_by(home)) == []
    assert list((home / "tmp").iterdir()) == []
    for root in (V1, V2):
        assert list(root.glob(f"samestep-benchmark-{script.pid}-*")) == []


def test_every_script_is_run_here() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts - LIBRARIES == SMALLEST.keys()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            name,
            marks=[
                *([needs_root] if name in AS_ROOT else []),
                *([pytest.mark.full] if name in LONG else []),
            ],
        )
        for name in SMALLEST
    ],
)
def test_a_script_runs_as_documented_and_leaves_nothing(
    script: str, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    saving = (SAVING[script], str(saved)) if script in SAVING else ()
    process = start(script, tmp_path, *SMALLEST[script], *saving)
    printed = output(process)
    assert re.search(r"\bn\b", printed), printed
    assert_nothing_is_left(process, tmp_path)
    if script == "compare.py":
        assert_all_learn_alike(saved)
    if script == "records.py":  # the same bits on any machine, so the same success
        assert json.loads(saved.read_text())["rows"][0]["success"] == 1


@pytest.mark.parametrize(
    "options", [("probe", "--epochs", "1", *SMALL), ("watching", "--passes", "1")]
)
def test_what_looking_after_own_code_costs_is_measured(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    process = start("safety.py", tmp_path, *options, "--rounds", "1")
    assert "n=1" in output(process)
    assert_nothing_is_left(process, tmp_path)


def assert_all_learn_alike(saved: Path) -> None:
    first, *others = [
        row["test_accuracy"] for row in json.loads(saved.read_text())["rows"]
    ]
    assert first > 0.7
    assert all(abs(other - first) < 0.08 for other in others)


@pytest.mark.parametrize(
    ("peer", "package"),
    [
        ("accelerate-2", "accelerate"),
        ("lightning-2", "lightning"),
        ("jax-2", "jax"),
    ],
)
def test_a_peer_learns_as_much_as_samestep(
    peer: str, package: str, tmp_path: Path
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: it is in the extra `benchmarks`")
    saved = tmp_path / "saved.json"
    names = ("mnist-mlp-classic", "samestep-1", peer)
    process = start("compare.py", tmp_path, *names, *TWO_EPOCHS, "--save", str(saved))
    output(process)
    assert_nothing_is_left(process, tmp_path)
    assert_all_learn_alike(saved)


def test_contenders_with_other_networks_are_not_compared() -> None:
    with pytest.raises(SystemExit, match="those of plain-1 \\[\\[10\\]\\]"):
        compare.check_network("plain-1", [[10], [10, 784]], [[10]])


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({}, []),
        ({"optimizer.max_grad_norm": 1.0}, []),
        ({"precision": "bf16"}, ["precision"]),
        ({"freeze": ["bias"]}, ["freeze"]),
        ({"data.augment.shift": 2}, ["data.augment"]),
        (
            {"optimizer.decay_norms_and_biases": False},
            ["optimizer.decay_norms_and_biases"],
        ),
    ],
)
def test_what_the_peers_would_leave_out_is_refused(
    changes: dict[str, Any], unread: list[str]
) -> None:
    fields = {"arithmetic": "torch"} | changes  # which knows all of them
    assert compare.unread(Recipe.load("mnist-mlp", fields)) == unread


@pytest.mark.parametrize(
    ("script", "options", "reached"),
    [
        ("compare.py", ("mnist-mlp", "ddp-2", "--epochs", "99"), "peers/ddp.py"),
        pytest.param(
            *("nodes.py", ("throughput",), "samestep.worker"), marks=needs_root
        ),
    ],
)
def test_sigterm_leaves_nothing_of_a_script(
    script: str, options: tuple[str, ...], reached: str, tmp_path: Path
) -> None:
    process = start(script, tmp_path, *options)
    wait_until(
        lambda: any(reached in " ".join(p.cmdline()) for p in started_by(tmp_path))
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert_nothing_is_left(process, tmp_path)


@needs_root
def test_ctrl_c_leaves_nothing_of_a_script(tmp_path: Path) -> None:
    """A terminal sends it to all of the script's processes, hosts' among them."""
    process = start("nodes.py", tmp_path, "throughput")
    wait_until(
        lambda: any("samestep.worker" in p.cmdline() for p in started_by(tmp_path))
    )
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert_nothing_is_left(process, tmp_path)


def test_the_run_for_a_gpu_says_what_passed_and_what_was_skipped(
    tmp_path: Path,
) -> None:
    """Of the dry run on the CPU only what takes seconds."""
    (tmp_path / "tmp").mkdir()
    parts = ("product-on-host", "product-on-gpu")
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu"]
    process = subprocess.Popen(
        ["bash", *command, "--out", str(tmp_path / "saved"), "--parts", *parts],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **marked(tmp_path),
            "TMPDIR": str(tmp_path / "tmp"),
            "PYTHON": sys.executable,
        },
        start_new_session=True,
    )
    assert "n = 2 parts: 1 passed, 0 failed, 1 skipped" in output(process)
    assert_nothing_is_left(process, tmp_path)
    on_host, on_gpu = json.loads((tmp_path / "saved" / "gpu.json").read_text())[
        "parts"
    ].values()
    assert set(on_host["checks"].values()) == {"identical"}
    assert on_host["figures"]["n"] == len(on_host["checks"])
    assert on_gpu["message"] == "needs a GPU"
    assert "130 x 520 x 129" in (tmp_path / "saved" / "gpu.log").read_text()


def test_a_part_that_hangs_leaves_the_others_their_time() -> None:
    hanging = subprocess.Popen(["sleep", "300"])
    assert gpu_run.wait(hanging, 0.01) == "stopped at its deadline of 0 s"
    assert hanging.poll() == -signal.SIGKILL
    parts = gpu_parts.PARTS.values()
    timed = sum(part.seconds for part in parts if part.is_timed)
    assert timed + max(part.seconds for part in parts) <= gpu_parts.SECONDS < 8 * 60


def test_a_part_goes_on_after_a_check_that_fails(tmp_path: Path) -> None:
    def fail() -> str:
        raise ValueError("of no use")

    def part(report: Report) -> None:
        report.check("first", fail)
        report.check("second", lambda: "identical")

    Report(tmp_path / "report.json").run(part)
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "status": "failed",
        "message": "first: failed: ValueError: of no use",
        "checks": {"first": "failed: ValueError: of no use", "second": "identical"},
    }


def documented() -> Iterator[list[str]]:
    """Script and arguments of every benchmark in the documents' blocks."""
    for page in PAGES:
        for words in commands(page, "python"):
            if words and words[0].startswith("benchmarks/"):
                yield words


def test_every_documented_option_is_one_of_the_script() -> None:
    for path, *words in documented():
        script = ROOT / path
        given = {word for word in words if word.startswith("--")}
        assert given <= set(re.findall(r'"(--[a-z-]+)"', script.read_text())), words
        if script.name == "compare.py":
            recipe, *names = [w for w in words if re.fullmatch(r"[a-z]+-[a-z0-9-]+", w)]
            assert Recipe.load(recipe)
            assert set(names) <= compare.CONTENDERS.keys()


NETWORKS = [
    ("mnist-mlp", {}),
    ("mnist-mlp", {"model.norm": "batch"}),
    ("mnist-mlp-classic", {}),
    ("mnist-cnn", {}),
    ("mnist-cnn", {"model.norm": "batch"}),
    ("chars-transformer", {"data.path": str(ROOT / "docs"), "data.pattern": "*.md"}),
]


@pytest.mark.parametrize(("name", "changes"), NETWORKS)
def test_the_network_of_the_peers_is_that_of_samestep(
    name: str, changes: dict[str, str]
) -> None:
    recipe = Recipe.load(name, changes)
    data = dataset.load(recipe.data)
    first = data.first(3).splits["train"]
    inputs, targets = in_memory(recipe, first)
    task = Task(recipe, 1, 1, data, (inputs, targets), (inputs, targets))
    peer, own = task.model().eval(), models.build(recipe.model, data).eval()
    assert shapes(peer) == shapes(own)
    with torch.inference_mode():
        assert peer(inputs).shape == own(first.gather(torch.arange(3))[0]).shape
