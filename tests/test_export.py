"""Models for other programs: whatever is written predicts the same, or is not there."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Own, Train, small_recipe
from own_samples import EVERYTHING
from torch import nn

import samestep
from samestep import ExportError, OwnCodeError, Recipe, Run, RunError
from samestep.api import export
from samestep.output.console import SilentView
from samestep.state.fingerprint import fingerprint
from samestep.supervisor.forkserver_client import ForkServer


SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [8], "norm": "batch"},
    "cnn": {"channels": [3, 4], "kernels": [5, 3], "hidden": [9]},
    "rnn": {"cell": "gru", "hidden": 7},
    "vit": {"patch": 7, "width": 8, "depth": 1, "heads": 2},
}


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Run:
    """Trained once for the tests that only need any run."""
    where = samestep.Placement(
        workers=1, out=tmp_path_factory.mktemp("export") / "run", tensorboard=False
    )
    server = request.getfixturevalue("server")
    return samestep.train(small_recipe(), where, view=SilentView(), server=server)


def run_of(train: Train, family: str) -> Run:
    return train(small_recipe(model={"family": family, **SMALL[family]}))


@pytest.mark.parametrize("form", ["safetensors", "state_dict"])
def test_weights_come_back_with_the_same_bits(mlp: Run, form: str) -> None:
    done = export.export(mlp, form)
    assert (done.samples, done.difference) == (256, 0.0)
    if form == "state_dict":
        state = torch.load(done.path, weights_only=True)
        assert fingerprint(state) == mlp.weights_sha256


@pytest.mark.parametrize("family", SMALL)
def test_every_family_predicts_the_same_as_onnx(train: Train, family: str) -> None:
    done = export.export(run_of(train, family), "onnx")
    assert done.samples == 256
    assert done.difference < 1e-5


def test_a_model_of_text_predicts_the_same_as_onnx(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("the cat sat on the mat. " * 99)
    fields = small_recipe(global_batch=15).to_dict()
    fields["data"] = {"source": "text", "path": f"{tmp_path}/book.txt", "context": 9}
    fields["model"] = {"family": "transformer", "width": 8, "depth": 1, "heads": 2}
    done = export.export(train(Recipe.from_dict(fields)), "onnx")
    assert done.difference < 1e-5


def test_own_models_are_exported_by_name_or_given_again(
    train: Train, own: Own, tmp_path: Path
) -> None:
    run = train(own(EVERYTHING, global_batch=36))
    for form in export.SUFFIXES:
        done = export.export(run, form)
        assert done.samples == 15
    assert run.export(out=tmp_path / "other.safetensors") == (
        tmp_path / "other.safetensors"
    )


def test_what_was_given_as_an_object_is_given_again(
    server: ForkServer, tmp_path: Path
) -> None:
    inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {
        "model": lambda inputs, outputs: nn.Linear(inputs[0], outputs),
        "data": (inputs, (inputs[:, 0] > 0).long()),
    }
    quiet: dict[str, Any] = {"view": SilentView(), "server": server, "epochs": 1}
    run = samestep.train(**given, **quiet, workers=1, out=tmp_path / "run")
    assert run.export("state_dict", **given).name == "exported.pt"
    with pytest.raises(OwnCodeError, match=r"Give it again: `data="):
        run.export("safetensors", model=given["model"])
    with pytest.raises(OwnCodeError, match=r"Give it again: `model="):
        run.export("safetensors", data=given["data"])


def test_a_file_that_predicts_otherwise_is_deleted(
    mlp: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, form: str) -> bytes:
        for parameter in model.parameters():
            parameter.data.mul_(1 + 1e-6)
        return whole(model, form)

    whole = export._weights
    monkeypatch.setattr(export, "_weights", wrong)
    with pytest.raises(ExportError, match=r"differed by up to .* and it was deleted"):
        export.export(mlp, "state_dict", tmp_path / "wrong.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_onnx_cannot_express_leaves_no_file(
    train: Train, own: Own, tmp_path: Path
) -> None:
    run = train(
        own(
            "class Net(nn.Linear):\n"
            " def forward(self, x):\n"
            "  return super().forward(x * (1.0 if x.sum() > 1e9 else 2.0))\n"
            "def build(inputs, outputs): return Net(*inputs, outputs)\n"
        )
    )
    with pytest.raises(ExportError, match=r"ONNX has no form for this model: "):
        export.export(run, "onnx", tmp_path / "none.onnx")
    assert not (tmp_path / "none.onnx").exists()


def test_in_float64_onnx_has_the_accuracy_or_says_what_cannot_be_run(
    train: Train,
) -> None:
    fields = {"precision": "float64", "data__train_samples": 300}
    mlp, cnn = (
        train(small_recipe(model={"family": family, **SMALL[family]}, **fields))
        for family in ("mlp", "cnn")
    )
    assert export.export(mlp, "onnx").difference < 1e-12
    with pytest.raises(ExportError, match=r"onnxruntime cannot run.*lacks.*float64"):
        export.export(cnn, "onnx")
    assert not list(cnn.path.glob("exported*"))


def test_nothing_is_overwritten_and_formats_are_known(mlp: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_text("precious")
    with pytest.raises(RunError, match="exists already and is not overwritten"):
        mlp.export("state_dict", tmp_path / "mine.pt")
    assert (tmp_path / "mine.pt").read_text() == "precious"
    with pytest.raises(RunError, match="Did you mean `onnx`"):
        mlp.export("onxx", tmp_path / "new")


def test_the_command_says_what_was_proven(mlp: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "model.pt")
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "samestep", "export", str(mlp.path)),
            *("--format", "state_dict", "--out", out),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{out}: predictions on 256 samples: the same bits\n"
