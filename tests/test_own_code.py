"""The user's own model, data and loss, by name: the contract of docs/own-code.md."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Own, Train
from own_samples import DATASETS, EVERYTHING, HEAD, LOSS, REGRESSION, TOKENS

import samestep
from samestep import OwnCodeError, Run
from samestep.errors import SamestepError, UsageError
from samestep.output.console import SilentView
from samestep.state.fingerprint import fingerprint
from samestep.supervisor.forkserver_client import ForkServer
from samestep.verification.replicas import load


EXAMPLES = Path(__file__).parents[1] / "examples"
HEADER = '"""\n\n'
"""What ends the description of an example."""
DEADLINE = 120.0

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": (EVERYTHING, {"global_batch": 36, "optimizer.weight_decay": 0.01}),
    "data-sets-that-draw": (DATASETS, {}),
    "regression": (REGRESSION, {"loss": {"name": "squared-error"}}),
    "next-token": (TOKENS, {}),
    "loss": (LOSS, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_own_code_has_one_fingerprint_at_any_placement(
    train: Train, own: Own, kind: str
) -> None:
    code, fields = KINDS[kind]
    recipe = own(code, **fields)
    alone = train(recipe, 1)
    for workers, exchange in ((2, "shared"), (3, "gloo")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
        assert run.result["test_loss"] == alone.result["test_loss"]
        assert run.history[0]["train_loss"] == alone.history[0]["train_loss"]


def test_frozen_and_tied_parameters_and_buffers_that_stay_are_in_the_model_file(
    train: Train, own: Own, server: ForkServer
) -> None:
    recipe = own(EVERYTHING, global_batch=36)
    run = train(recipe, 2)
    model = run.load_model()
    assert fingerprint(model.state_dict()) == run.weights_sha256
    assert not model.training
    stored = load(run.model_file)
    assert stored.keys() == model.state_dict().keys()
    assert stored["head.weight"].equal(stored["tied.weight"])
    assert stored["order"].equal(torch.arange(8))
    assert stored["scale"].equal(torch.full((1, 8), 0.1))
    found = samestep.evaluate(run, workers=2, server=server)
    assert found.loss == run.result["test_loss"]
    assert found.weights_sha256 == run.weights_sha256


def test_a_run_with_constants_goes_on_from_its_checkpoint(
    train: Train, own: Own, server: ForkServer
) -> None:
    run = train(own(EVERYTHING, global_batch=36), 2)
    whole = train(run.recipe.changed({"epochs": 2}), 1)
    longer = samestep.resume(run, epochs=2, workers=1, view=SilentView(), server=server)
    assert longer.weights_sha256 == whole.weights_sha256


def test_a_single_data_set_is_divided_by_its_own_seed(train: Train, own: Own) -> None:
    recipe = own(DATASETS, **{"data.test": 0.2, "data.validation": 0.05})
    run = train(recipe, 1)
    assert sum(map(sum, run.result["test_confusion"])) == 20
    events = (run.path / "events.jsonl").read_text().splitlines()
    started = next(e for e in map(json.loads, events) if e["event"] == "training")
    assert started["train_samples"] == 75


BAD: dict[str, tuple[str, str]] = {
    "no-module": (
        "def build(): return 5",
        "must return a torch.nn.Module",
    ),
    "no-parameters": ("def build(): return nn.ReLU()", "it has none"),
    "all-frozen": (
        "def build(): return nn.Linear(5, 3).requires_grad_(False)",
        "all are frozen",
    ),
    "needs-more": (
        "def build(outputs, depth): pass",
        "missing a required argument",
    ),
    "layer": (
        "def build(): return nn.Sequential(nn.Linear(5, 4), nn.Linear(9, 3))",
        r"in layer `1`, Linear\(in_features=9.*which received \[2, 4\]",
    ),
    "outputs": (
        "def build(): return nn.Linear(5, 4)",
        r"have the shape \[2, 3\]; .* returned \[2, 4\]. The data have 3 classes",
    ),
    "unused": (
        "class Net(nn.Linear):\n"
        " def forward(self, x): return x[:, :3].requires_grad_()\n"
        "def build(): return Net(5, 3)",
        "of `mine_.*`, none has a gradient",
    ),
    "double": ("def build(): return nn.Linear(5, 3).double()", "trained in float32"),
    "frozen-bfloat16": (
        "def build():\n m = nn.Linear(5, 3)\n"
        " m.register_buffer('brief', torch.ones(2, dtype=torch.bfloat16))\n return m",
        "a type that numpy has.*`brief` is torch.bfloat16",
    ),
    "lazy": ("def build(): return nn.LazyLinear(3)", "lazy modules"),
    "raises": ("def build(): return {}['nothing']", "failed: KeyError: 'nothing'"),
    "empty": ("def load(): return {'train': ([], [])}", "has no training samples"),
    "uneven": (
        "def load(): return {'train': (torch.ones(4, 5), torch.ones(3))}",
        r"their shapes are \[4, 5\] .* and \[3\]",
    ),
    "no-train": ("def load(): return {'test': some()}", "must have a split `train`"),
    "typo": ("def load(): return {'trian': some()}", "Did you mean `train`"),
    "no-length": (
        "class Endless:\n def __getitem__(self, i): return some()[0][0], 1\n"
        "def load(): return Endless()",
        "has no length",
    ),
    "other-sample": (
        "def load(): return [(1, 2, 3)] * 40",
        r"A sample of .* is \(input, target\)",
    ),
    "negative-label": (
        "def load():\n x, y = some()\n y[7] = -1\n return {'train': (x, y)}",
        "sample 7 of .*, split `train` has -1",
    ),
    "label-too-high": (
        "def load():\n x, y = some()\n return {'train': (x, y), 'test': (x, y + 1)}",
        "sample 2 of .*, split `test` has 3",
    ),
    "other-shape": (
        "def load(): return {'train': some(), 'test': some(width=6)}",
        r"those of `train` have \[5\]; the first of .*split `test` has \[6\]",
    ),
    "wrong-task": (
        "def load():\n x, y = some()\n return {'train': (x, y.float())}",
        "Use `--loss squared-error`",
    ),
    "loss-shape": (
        "def loss(outputs, targets): return outputs",
        r"a tensor \[\], or their losses \[2\].*received a tensor \[2, 3\]",
    ),
    "loss-detached": (
        "def loss(outputs, targets): return outputs.detach().sum()",
        "has no gradient",
    ),
    "no-metrics": (
        "def loss(outputs, targets): return outputs.sum(), 'five'",
        "metrics are a dictionary of 1 to 64.*received 'five'",
    ),
    "metric-of-words": (
        "def loss(outputs, targets): return outputs.sum(), {'a': 'high'}",
        r"the metric `a` is a sum.*`\(sum, count\)`; received 'high'",
    ),
    "three-parts": (
        "def loss(outputs, targets): return outputs.sum(), {'a': (1, 2, 3)}",
        r"the metric `a` is a sum.*received \(1, 2, 3\)",
    ),
    "name-of-another-field": (
        "def loss(outputs, targets): return outputs.sum(), {'lr': 1}",
        "no other field of a record has; received 'lr'",
    ),
    "other-metrics": (
        "def loss(outputs, targets):\n"
        " return outputs.sum(), {'few' if len(targets) < 3 else 'many': (1, 2)}",
        r"at first that was `few` \(counted\), now it is `many` \(counted\)",
    ),
    "negative-count": (
        "def loss(outputs, targets): return outputs.sum(), -1",
        "the count of a loss is the number of targets.*not negative; received -1",
    ),
    "changing-buffer": (
        "class Net(nn.Linear):\n"
        " def __init__(self):\n"
        "  super().__init__(5, 3)\n"
        "  self.register_buffer('seen', torch.zeros((), dtype=torch.int64))\n"
        " def forward(self, x):\n"
        "  self.seen += len(x)\n"
        "  return super().forward(x)\n"
        "def build(): return Net()",
        "must be a persistent float32 buffer.*`seen`",
    ),
}

LATER = ("other-metrics",)
"""What is met when the training has begun."""


@pytest.mark.parametrize("bad", BAD)
def test_what_is_wrong_with_own_code_is_said_with_its_name(
    train: Train, own: Own, bad: str
) -> None:
    code, message = BAD[bad]
    with pytest.raises(SamestepError, match=f"(?s){message}") as caught:
        train(own(code))
    assert "mine_" in str(caught.value) or bad in ("wrong-task", "frozen-bfloat16")
    assert caught.value.exit_code == (1 if bad in LATER else 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.build", "nowhere:build", "there is no `nowhere`"),
        ("model.build", "os:system", "Code that only a file names must be below"),
        ("data.load", "mine:laod", "no function `laod`. Did you mean `load`"),
        ("model.arguments", {"widht": 3}, "takes no argument `widht`"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_usage_error(
    train: Train, own: Own, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    (tmp_path / "mine.py").write_text(HEAD)
    with pytest.raises(UsageError, match=message):
        train(own("", **{field: value}))


def test_batch_norm_with_one_sample_per_micro_batch_is_refused(
    train: Train, own: Own
) -> None:
    with pytest.raises(samestep.RecipeError, match="micro-batches of one sample"):
        train(own(EVERYTHING, global_batch=6))


def test_an_exception_of_the_users_shows_the_users_frames_only(
    train: Train, own: Own
) -> None:
    code = (
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if len(x) < 3:\n"
        "            return super().forward(x)\n"
        "        raise ValueError('three is a crowd')\n"
        "def build(inputs, outputs): return Net(*inputs, outputs)\n"
    )
    with pytest.raises(samestep.WorkerFailed, match="three is a crowd") as caught:
        train(own(code), max_restarts=0)
    shown = caught.value.details["traceback"]
    assert "line 35, in forward" in shown or "in forward" in shown
    assert "raise ValueError('three is a crowd')" in shown
    assert "samestep" not in shown.replace(str(Path.cwd()), "")
    assert caught.value.__notes__ == [shown]


def test_resume_refuses_code_that_has_changed(
    train: Train, own: Own, server: ForkServer, tmp_path: Path
) -> None:
    run = train(own(LOSS), 1)
    (module,) = tmp_path.glob("mine_*.py")
    module.write_text(module.read_text() + "# changed\n")
    with pytest.raises(samestep.CheckpointError, match=f"file of {module.stem}:load"):
        samestep.resume(run, epochs=2, server=server, view=SilentView())
    accepted = samestep.resume(
        run, epochs=2, server=server, view=SilentView(), allow_different_numerics=True
    )
    assert accepted.status == "finished"


def command(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "samestep", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_the_example_does_what_the_guide_says(tmp_path: Path) -> None:
    guide = (EXAMPLES.parent / "docs" / "own-code.md").read_text()
    code = (EXAMPLES / "my_digits.py").read_text()
    assert code.partition(HEADER)[2] in guide
    (tmp_path / "my_digits.py").write_text(code)
    names = [f"--{p}=my_digits:{f}" for p, f in PARTS.items()]
    ended = command("train", *names, "--workers=2", "--out=run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "nearly_right" in ended.stdout
    again = command("train", "run/recipe.toml", "--out=again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    finals = [Run.open(tmp_path / name).weights_sha256 for name in ("run", "again")]
    assert finals[0] == finals[1]


PARTS = {"model": "build", "data": "load", "loss": "loss"}


def test_a_failing_command_shows_the_users_frames(tmp_path: Path) -> None:
    code = HEAD + "def build(inputs, outputs):\n    return missing(inputs)\n"
    (tmp_path / "faulty.py").write_text(code)
    names = ["--model=faulty:build", "--data=faulty:load"]
    ended = command("train", *names, "--out=run", cwd=tmp_path)
    assert ended.returncode == 2
    assert "    return missing(inputs)" in ended.stderr
    assert "samestep/" not in ended.stderr
    assert "Error: `faulty:build` failed: NameError" in ended.stderr
    assert issubclass(OwnCodeError, SamestepError)


@pytest.mark.parametrize("command_", ["train", "check"])
def test_a_failed_start_leaves_nothing_and_shows_the_error_once(
    tmp_path: Path, command_: str
) -> None:
    code = HEAD + "def build(inputs, outputs):\n    return missing(inputs)\n"
    (tmp_path / "faulty.py").write_text(code)
    names = ["--model=faulty:build", "--data=faulty:load"]
    out = ["--out=run"] if command_ == "train" else []
    ended = command(command_, *names, *out, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.count("NameError: name 'missing' is not defined") == 2
    assert ended.stderr.count("`faulty:build` failed: NameError") == 1
    assert "log:" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_validation_loss_that_is_not_a_number_is_said(
    train: Train, own: Own, caplog: pytest.LogCaptureFixture, server: ForkServer
) -> None:
    code = (
        "def load():\n"
        " x, y = some()\n"
        " bad = x[80:].clone()\n"
        " bad[3, 1] = float('nan')\n"
        " return {'train': (x[:70], y[:70]), 'validation': (bad, y[80:])}"
    )
    run = samestep.train(own(code), workers=1, server=server)
    assert "the validation loss is nan: an input" in caplog.text
    events = (run.path / "events.jsonl").read_text().splitlines()
    (said,) = [e for e in map(json.loads, events) if e["event"] == "not finite"]
    assert (said["split"], said["epoch"]) == ("validation", 1)
