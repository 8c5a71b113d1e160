"""What decides bits is kept with a run, and is alike on all workers from the start."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Own, Train, fault, small_recipe
from machines import machines
from test_exactness import results

import samestep
from samestep.errors import CheckpointError, OwnCodeError, PlacementError
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import conditions


CONSTANT = {"name": "constant"}
DEADLINE = 120


class Notes(SilentView):
    """Keeps what a user would read."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def go_on(run: samestep.Run, server: ForkServer, **more: Any) -> list[str]:
    """Train for another epoch; return the notices."""
    view = Notes()
    samestep.resume(run, epochs=2, server=server, view=view, **more)
    return view.said


def test_a_variable_that_chooses_kernels_is_a_condition_of_resume(train: Train) -> None:
    run = train(small_recipe(schedule=CONSTANT))
    ended = subprocess.run(
        [sys.executable, "-m", "samestep", "resume", str(run.path), "--epochs", "2"],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    said = " ".join(ended.stderr.split())
    now = "MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 now"
    assert f"environment: none then, {now}" in said
    assert "--allow-different-numerics" in said


def test_another_machine_is_refused_by_name(
    train: Train, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(small_recipe(schedule=CONSTANT))
    own, build = conditions.of_machine(), server.build()
    for name in ("processor", "libc", "python"):
        there = {**build, name: "another"}
        monkeypatch.setattr(server, "build", lambda _, there=there: there)
        with pytest.raises(CheckpointError) as caught:
            go_on(run, server)
        assert f"{name}: {own[name]} then, another now" in str(caught.value)
    go_on(run, server, allow_different_numerics=True)


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(
    train: Train, server: ForkServer, own: Own
) -> None:
    long = train(own("", epochs=2, schedule=CONSTANT))
    write = checkpoint.write

    def as_before(
        path: Path, state: Any, layout: Any, recipe: Any, build: Any, epochs: Any
    ) -> Path:
        later = (*conditions.of_machine(), *conditions.FOUND_BY_WORKERS)
        build = {name: build[name] for name in build if name not in later}
        return write(path, state, layout, recipe, build, epochs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", as_before)
        run = train(own("", schedule=CONSTANT))
    said = go_on(run, server)
    (warning,) = [text for text in said if "earlier version" in text]
    assert "did not store: processor, libc, python, environment, samples." in warning
    assert results(samestep.Run.open(run.path)) == results(long)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, ""),
        ({"OMP_THREAD_LIMIT": "1"}, "OMP_THREAD_LIMIT in the environment allows 1"),
        ({"OMP_DYNAMIC": "true"}, "OMP_DYNAMIC in the environment allows"),
    ],
)
def test_threads_are_counted_and_not_believed(
    variables: dict[str, str], says: str
) -> None:
    code = (
        "import torch; from samestep.verification import threads\n"
        "torch.set_num_threads(2)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code + "threads.check(2)"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (ended.returncode == 0) == (not says), ended.stderr
    assert says in ended.stderr


def test_a_training_does_not_start_with_fewer_threads_than_its_recipe_says(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "samestep", "train", "mnist-mlp", "--set"]
    torch = ("--set", "arithmetic=torch")
    ended = subprocess.run(
        [*command, "threads=2", *torch, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == PlacementError.exit_code
    assert "`threads` is 2, and OMP_THREAD_LIMIT" in " ".join(ended.stderr.split())


LENGTH_BY_RANK = """
import os
def load():
    x, y = some(100 - 8 * int(os.environ["RANK"]))
    return {"train": (x, y), "test": (x[:9], y[:9])}
"""
SAMPLES_BY_RANK = """
import os
def load():
    x, y = some(100)
    return {"train": (x, y), "validation": (x + int(os.environ["RANK"]), y)}
"""
SEED_BY_RANK = """
import os
def build(inputs, outputs):
    torch.manual_seed(int(os.environ["RANK"]))
    return nn.Sequential(nn.Linear(inputs[0], 7), nn.ReLU(), nn.Linear(7, outputs))
"""
BUFFER_BY_RANK = """
import os
class Net(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.last = nn.Linear(inputs, outputs)
        self.register_buffer("shift", torch.ones(1) * int(os.environ["RANK"]))
    def forward(self, x):
        return self.last(x + self.shift)
def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""
SHAPE_BY_RANK = """
import os
def build(inputs, outputs):
    width = 7 + 900 * int(os.environ["RANK"])
    return nn.Sequential(
        nn.Linear(inputs[0], width), nn.ReLU(), nn.Linear(width, outputs)
    )
"""
DIFFERENT = [
    (
        LENGTH_BY_RANK,
        "The data of worker 1 have 92 training samples, those of worker 0 have 100; "
        "`load` must return the same data in every worker.",
    ),
    (SAMPLES_BY_RANK, "Some validation samples of worker 1 are not those that worker"),
    (
        SEED_BY_RANK,
        "`0.weight` of the model does not begin in worker 1 with the values",
    ),
    (BUFFER_BY_RANK, "`shift` of the model does not begin in worker 1"),
    (SHAPE_BY_RANK, "`0.weight` of the model does not begin in worker 1"),
]


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
@pytest.mark.parametrize(("code", "says"), DIFFERENT)
def test_workers_that_are_not_alike_do_not_start(
    train: Train, own: Own, exchange: str, code: str, says: str
) -> None:
    with pytest.raises(OwnCodeError) as caught:
        train(own(code), 2, exchange=exchange)
    assert says in str(caught.value)


@pytest.mark.parametrize("code", [LENGTH_BY_RANK, SEED_BY_RANK])
def test_machines_that_are_not_alike_do_not_start(
    server: ForkServer, own: Own, tmp_path: Path, code: str
) -> None:
    says = dict(DIFFERENT)[code]
    with machines(server, tmp_path, own(code), [1, 1]) as played:
        played.listen()
    failed = [played.failure(rank) for rank in (0, 1)]
    errors = [(one.error, says in one.message) for one in failed]
    assert errors == [("OwnCodeError", True)] * 2


ANOTHER_ORDER = """
from pathlib import Path
def load():
    x, y = some()
    order = torch.arange(len(y))
    if Path(__file__).with_name("other").exists():
        order = order.flip(0)
    return x[order], y[order]
"""


def test_a_run_does_not_go_on_with_samples_in_another_order(
    train: Train, own: Own, server: ForkServer
) -> None:
    run = train(own(ANOTHER_ORDER, schedule=CONSTANT))
    Path("other").touch()
    with pytest.raises(CheckpointError, match=r"drawn samples have another checksum"):
        go_on(run, server)
    Path("other").unlink()
    long = train(own(ANOTHER_ORDER, epochs=2, schedule=CONSTANT))
    go_on(run, server)
    assert samestep.Run.open(run.path).weights_sha256 == long.weights_sha256


OTHER_WITH_EVERY_CALL = """
from pathlib import Path
def load():
    x, y = some()
    calls = Path(__file__).with_name("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    return x + len(calls.read_text()), y
"""


def test_a_restart_with_other_samples_ends_the_training(
    train_under: Train, own: Own
) -> None:
    recipe = own(OTHER_WITH_EVERY_CALL, epochs=2)
    kill, alone = fault("kill", "exchange", 4, 0), {"prefetch": "off", "probe": False}
    with pytest.raises(CheckpointError, match=r"`load` must return the same samples"):
        train_under(recipe, [kill], 1, **alone)
