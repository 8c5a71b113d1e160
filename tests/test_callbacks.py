"""Callbacks look on while a training runs, and cannot change its result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Own, Train, fault
from own_samples import HEAD
from test_resume import forget_after, resume

import samestep
from samestep import OwnCodeError, Run, TrainingError, UsageError
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.state.fingerprint import fingerprint
from samestep.supervisor.forkserver_client import ForkServer


CALLBACKS = """
import json, os
from pathlib import Path
from samestep.state.fingerprint import fingerprint

class Log:
    def __init__(self):
        self.calls = 0

    def write(self, event, state, **more):
        self.calls += 1
        line = {"event": event, "step": state.step, "epoch": state.epoch,
                "lr": state.lr, "metrics": dict(state.metrics), "call": self.calls,
                "rank": os.environ["RANK"], **more}
        with Path(__file__).with_name("calls.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\\n")

    def on_train_start(self, state):
        self.write("start", state)

    def on_step_end(self, state):
        weights = state.copy_weights()
        for value in weights.values():
            value.zero_()
        torch.manual_seed(7)
        random.seed(7)
        self.write("step", state)

    def on_evaluation_end(self, state):
        self.write("evaluation", state, sha256=fingerprint(state.copy_weights()))

    def on_train_end(self, state):
        self.write("end", state, sha256=fingerprint(state.copy_weights()))

class Snapshots:
    def on_snapshot(self, state):
        with Path(__file__).with_name("snapshots.txt").open("a") as file:
            file.write(f"{state.step}\\n")

class Failing:
    def on_step_end(self, state):
        if state.step == 2:
            raise ValueError("two")

class Leaving:
    def on_train_start(self, state):
        sys.exit(0)

class Assigning:
    def on_train_start(self, state):
        state.step = 5

class Changing:
    def on_step_end(self, state):
        torch.set_grad_enabled(False)

class Typo:
    def on_step_ends(self, state):
        pass

class Silent:
    pass
"""


def module_of(recipe: samestep.Recipe) -> str:
    build: str = recipe.to_dict()["model"]["build"]
    return build.partition(":")[0]


def calls(path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (path / "calls.jsonl").read_text().splitlines()
    ]


def test_callbacks_see_every_step_and_change_no_bit(
    own: Own, train: Train, server: ForkServer, tmp_path: Path
) -> None:
    recipe = own(CALLBACKS, epochs=2, ema={"decay": 0.5})
    plain = train(recipe, 1)
    seen = []
    for workers, exchange in ((2, "gloo"), (3, "shared")):
        log = f"{module_of(recipe)}:Log"
        run = train(recipe, workers, exchange=exchange, callbacks=[log])
        assert run.weights_sha256 == plain.weights_sha256
        seen.append(calls(tmp_path))
        (tmp_path / "calls.jsonl").unlink()
        assert seen[-1] == seen[0]
    events = [(call["event"], call["step"], call["epoch"]) for call in seen[0]]
    assert events == [
        ("start", 0, 1),
        *(("step", step, 1) for step in (1, 2, 3)),
        ("evaluation", 3, 1),
        *(("step", step, 2) for step in (4, 5, 6)),
        ("evaluation", 6, 2),
        ("end", 6, 2),
    ]
    assert {call["rank"] for call in seen[0]} == {"0"}
    assert {call["lr"] for call in seen[0]} == {0.01}
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["type"] == "step"]
    steps = [call for call in seen[0] if call["event"] == "step"]
    assert [call["metrics"]["loss"] for call in steps] == losses
    evaluation, end = seen[0][-2:]
    assert evaluation["metrics"]["validation_loss"] == run.history[1]["validation_loss"]
    assert evaluation["sha256"] == run.history[1]["weights_sha256"]
    assert end["metrics"]["test_loss"] == run.result["test_loss"]
    assert end["sha256"] == run.weights_sha256


def test_a_restart_begins_with_callbacks_made_anew(
    own: Own, train_under: Train, server: ForkServer, tmp_path: Path
) -> None:
    recipe = own(CALLBACKS, epochs=2)
    log = f"{module_of(recipe)}:Log"
    kill = [fault("kill", "update", 4, rank=0)]
    run = train_under(recipe, kill, 2, callbacks=[log])
    seen = calls(tmp_path)
    starts = [call for call in seen if call["event"] == "start"]
    assert [call["call"] for call in starts] == [1, 1]
    assert starts[1]["step"] == 4
    steps = [call["step"] for call in seen if call["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]

    (tmp_path / "calls.jsonl").unlink()
    first, *_ = checkpoint.steps(checkpoint.directory_of(run.path))
    forget_after(run.path, first)
    again = resume(run.path, server, 3, callbacks=[log])
    assert again.weights_sha256 == run.weights_sha256
    assert calls(tmp_path)[0]["step"] == first


def test_callbacks_see_portable_trainings(
    own: Own, train: Train, tmp_path: Path
) -> None:
    recipe = own(CALLBACKS, arithmetic="portable")
    plain = train(recipe, 2)
    run = train(recipe, 2, callbacks=[f"{module_of(recipe)}:Log"])
    assert run.weights_sha256 == plain.weights_sha256 == calls(tmp_path)[-1]["sha256"]


def test_a_callback_is_called_after_snapshots(
    own: Own, train: Train, tmp_path: Path
) -> None:
    recipe = own(CALLBACKS)
    name = f"{module_of(recipe)}:Snapshots"
    train(recipe, 1, callbacks=[name], snapshot_seconds=1e-9)
    assert (tmp_path / "snapshots.txt").read_text().split() == ["1", "2", "3"]


class Recorder:
    """Writes the norm of the first matrix after each step."""

    def __init__(self, path: Path) -> None:
        """Take the path of the file."""
        self.path = path

    def on_step_end(self, state: Any) -> None:
        """Append a line."""
        first, *_ = state.copy_weights().values()
        with self.path.open("a") as file:
            file.write(f"{state.step} {first.norm().item()}\n")


def test_objects_and_classes_are_given_in_python(
    server: ForkServer, tmp_path: Path
) -> None:
    path = tmp_path / "norms.txt"
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    class Last:
        def on_train_end(self, state: Any) -> None:
            sha256 = fingerprint(state.copy_weights())
            path.with_name("last.txt").write_text(sha256)

    run = samestep.train(
        model=torch.nn.Linear(4, 2),
        data=(x, (x[:, 0] > 0).long()),
        epochs=1,
        global_batch=16,
        workers=2,
        out=tmp_path / "run",
        callbacks=[Recorder(path), Last],
        view=SilentView(),
        server=server,
    )
    assert [line.split()[0] for line in path.read_text().splitlines()] == ["1", "2"]
    assert path.with_name("last.txt").read_text() == run.weights_sha256


FAILING = {
    "Failing": ("`on_step_end` of the callback `.*Failing` failed: ValueError: two"),
    "Leaving": r"`on_train_start` of .* it called `sys.exit\(0\)`",
    "Assigning": "FrozenInstanceError: cannot assign to field 'step'",
    "Changing": "none of PyTorch's settings; `on_step_end` of .*Changing` changed",
}


@pytest.mark.parametrize("name", FAILING)
def test_a_callback_that_fails_ends_the_training_and_is_named(
    own: Own, train: Train, name: str
) -> None:
    recipe = own(CALLBACKS + "\nimport sys\n")
    with pytest.raises(TrainingError, match=FAILING[name]):
        train(recipe, 2, callbacks=[f"{module_of(recipe)}:{name}"])


def test_a_callback_has_known_methods(own: Own, train: Train) -> None:
    recipe = own(CALLBACKS)
    with pytest.raises(
        OwnCodeError, match=r"`on_step_ends`\. Did you mean `on_step_end`"
    ):
        train(recipe, 1, callbacks=[f"{module_of(recipe)}:Typo"])
    with pytest.raises(OwnCodeError, match="Silent` has none"):
        train(recipe, 1, callbacks=[f"{module_of(recipe)}:Silent"])
    with pytest.raises(UsageError, match="there is no `nowhere`"):
        train(recipe, 1, callbacks=["nowhere:Log"])


def test_the_command_line_takes_callbacks(own: Own, tmp_path: Path) -> None:
    recipe = own(CALLBACKS)
    name = module_of(recipe)
    assert (tmp_path / f"{name}.py").read_text().startswith(HEAD)
    options = [
        *(f"--model={name}:build", f"--data={name}:load", "--epochs=1", "--workers=2"),
        *(f"--callback={name}:Log", f"--callback={name}:Snapshots", "--out=run"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "samestep", "train", *options, "--no-report"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path)[-1]["sha256"] == Run.open(tmp_path / "run").weights_sha256
    assert (tmp_path / "snapshots.txt").exists()
