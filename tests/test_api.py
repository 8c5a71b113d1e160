import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Train, small_recipe

import samestep
from samestep.supervisor.forkserver_client import ForkServer


SCRIPT = """
import samestep

recipe = samestep.Recipe.load(
    "mnist-mlp", {"epochs": 1, "data.train_samples": 600, "model.hidden": [8]}
)
run = samestep.train(recipe, samestep.Placement(workers=2, out="run"))
found = samestep.evaluate(run, samestep.Placement(workers=1))
assert found.weights_sha256 == run.weights_sha256
assert found.accuracy == run.result["test_accuracy"]
print(run.weights_sha256)
"""


def test_the_public_names_are_those_of_all() -> None:
    public = {name for name in dir(samestep) if not name.startswith("_")}
    assert public == set(samestep.__all__)
    assert all(getattr(samestep, name) is not None for name in public)
    assert samestep.__all__ == sorted(samestep.__all__)
    with pytest.raises(AttributeError, match="has no attribute `Trainer`"):
        samestep.Trainer  # noqa: B018


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    run = samestep.Run.open(tmp_path / "run")
    assert ended.stdout == f"{run.weights_sha256}\n"


def test_evaluation_agrees_at_any_number_of_workers(
    train: Train, server: ForkServer
) -> None:
    run = train(small_recipe(evaluation_batch=333), 2)
    for workers in (1, 2, 8):
        where = samestep.Placement(workers=workers)
        found = samestep.evaluate(run.path, where, server=server)
        assert found.loss == run.result["test_loss"]
        assert found.targets == 10_000
        held_out = samestep.evaluate(run, where, split="validation", server=server)
        assert held_out.loss == run.history[-1]["validation_loss"]


def test_a_model_file_can_be_evaluated_alone(
    train: Train, server: ForkServer, tmp_path: Path
) -> None:
    run = train(small_recipe())
    moved = run.model_file.rename(tmp_path / "moved.safetensors")
    found = samestep.evaluate(moved, samestep.Placement(workers=1), server=server)
    assert found.weights_sha256 == run.weights_sha256


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 100])
def test_a_foreign_model_file_is_refused(
    tmp_path: Path, server: ForkServer, content: bytes
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(samestep.RunError, match="is not a readable model file"):
        samestep.evaluate(file, server=server)


def test_a_failed_run_cannot_be_evaluated(
    train: Train, server: ForkServer, tmp_path: Path
) -> None:
    recipe = small_recipe(optimizer={"name": "sgd", "lr": 1e30})
    with pytest.raises(samestep.NonFiniteLoss):
        train(recipe, out=tmp_path / "failed")
    with pytest.raises(samestep.RunError, match="its status is failed"):
        samestep.evaluate(tmp_path / "failed", server=server)


def test_validation_that_was_not_held_out_is_an_error(
    train: Train, server: ForkServer
) -> None:
    run = train(small_recipe(data__validation=0))
    where = samestep.Placement(workers=1)
    with pytest.raises(samestep.RunError, match="holds out no validation samples"):
        samestep.evaluate(run, where, split="validation", server=server)
