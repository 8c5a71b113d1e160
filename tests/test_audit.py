"""Audits: clean for what was trained, and the first wrong step for what was not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Own, Train, small_recipe
from forging import (
    kept,
    load,
    rewrite_checkpoint,
    rewrite_ledger,
    rewrite_model,
    rewrite_result,
)
from own_samples import EVERYTHING
from test_resume import forget_after, resume
from test_streams_trained import STREAMS

import samestep
from samestep import Audit, Recipe, Run, RunError
from samestep.cli.main import cli
from samestep.output import ledger
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer


TORCH = small_recipe(epochs=4, model__norm="batch", schedule__name="constant")
PORTABLE = small_recipe(epochs=4, arithmetic="portable")


def audit(run: Run | Path, server: ForkServer, **options: Any) -> Audit:
    return samestep.audit(run, server=server, **{"workers": 1, "full": True} | options)


@pytest.fixture(scope="module")
def original(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audited") / "run"
    where = samestep.Placement(workers=1, keep_checkpoints=4, out=out)
    return samestep.train(TORCH, where, view=SilentView(), server=server).path


@pytest.fixture
def trained(original: Path, tmp_path: Path) -> Run:
    """Return a run of 44 steps, with checkpoints after 11, 22, 33 and 44."""
    return Run.open(shutil.copytree(original, tmp_path / "trained"))


def flip(vector: Any) -> None:
    vector.view(np.uint32)[..., 3] ^= np.uint32(1 << 20)


def elsewhere(run: Run, step: int, build: dict[str, str]) -> None:
    """Forge the conditions of a checkpoint."""
    conditions = load(run.path, step).manifest.build | build
    rewrite_checkpoint(run.path, step, manifest={"build": conditions})


def written(run: Run) -> dict[Path, int]:
    """Return when each file was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}


@pytest.mark.parametrize("recipe", [TORCH, PORTABLE], ids=["torch", "portable"])
def test_an_audit_of_a_training_finds_nothing_at_any_placement(
    train: Train, server: ForkServer, recipe: Recipe
) -> None:
    run = train(recipe, 2, keep_checkpoints=3)
    before = written(run)
    found = audit(run, server, workers=3, exchange="gloo")
    assert (found.mismatch, found.step) == (None, None)
    assert (found.checked, found.steps) == (44, 44)
    assert written(run) == before


def test_segments_are_chosen_by_the_seed(trained: Run, server: ForkServer) -> None:
    one, other, again = (
        audit(trained, server, full=False, segments=1, seed=seed) for seed in (1, 2, 1)
    )
    assert one.computed == again.computed != other.computed
    assert {len(each.computed) for each in (one, other)} == {1}
    assert one.mismatch is None
    assert one.probability(0.01) == pytest.approx(1 / 4)
    assert one.probability(0.26) == pytest.approx(1 / 2)
    assert one.probability(1.0) == 1.0


def test_an_audit_goes_on_after_a_kill_of_its_workers(
    trained: Run, server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"number": 1, "kind": "kill", "point": "update", "step": 15, "rank": 1}
    (tmp_path / "faults.json").write_text(json.dumps([fields]))
    monkeypatch.setenv("SAMESTEP_FAULTS", str(tmp_path / "faults.json"))
    assert audit(trained, server, workers=2).mismatch is None


def test_a_resumed_run_is_audited_like_others(trained: Run, server: ForkServer) -> None:
    forget_after(trained.path, 22)
    longer = resume(trained.path, server, 2, epochs=5, keep_checkpoints=4)
    assert audit(longer, server).mismatch is None


@pytest.mark.parametrize(("column", "part"), [(1, "gradient"), (2, "parameters")])
def test_an_edited_ledger_is_found_with_the_step(
    trained: Run, server: ForkServer, column: int, part: str
) -> None:
    def change(records: Any) -> None:
        records[records[:, 0] == 17, column] ^= np.uint64(1)

    rewrite_ledger(trained.path, change)
    found = audit(trained, server)
    assert found.step == 17
    assert f"step 17 differs when it is computed again: the hash of its {part}" in str(
        found.mismatch
    )


def test_a_ledger_that_was_edited_without_its_chain_is_found(
    trained: Run, server: ForkServer
) -> None:
    file = trained.path / "ledger"
    content = bytearray(file.read_bytes())
    content[ledger.HEADER.size + 20] ^= 1
    file.write_bytes(content)
    assert "chain of hashes is broken after step 0" in str(
        audit(trained, server).mismatch
    )


def test_a_ledger_that_was_cut_is_found(trained: Run, server: ForkServer) -> None:
    file = trained.path / "ledger"
    file.write_bytes(file.read_bytes()[:-64])
    assert audit(trained, server).mismatch == (
        "the SHA-256 of the ledger is not the one in result.json"
    )


def test_forged_parameters_of_a_checkpoint_are_found(
    trained: Run, server: ForkServer
) -> None:
    forged = load(trained.path, 22).state.parameters
    flip(forged)
    rewrite_checkpoint(trained.path, 22, parameters=forged)
    found = audit(trained, server, full=False, segments=1)
    assert found.step == 22
    assert "parameters of the checkpoint of step 22 are not those" in str(
        found.mismatch
    )


def test_a_forged_state_of_the_optimizer_is_found_with_the_step(
    trained: Run, server: ForkServer
) -> None:
    """Also if the training has gone on from it, so that all later steps follow."""
    forget_after(trained.path, 22)
    forged = load(trained.path, 22).state.states
    flip(forged)
    rewrite_checkpoint(trained.path, 22, states=forged)
    resume(trained.path, server, keep_checkpoints=4)
    found = audit(trained, server)
    assert found.step == 22
    assert "the optimizer's states in the checkpoint of step 22 differ" in str(
        found.mismatch
    )


def test_a_forged_factor_of_the_learning_rate_is_found(
    trained: Run, server: ForkServer
) -> None:
    """It is no vector, and the training goes on from it, so all later steps follow."""
    forget_after(trained.path, 22)
    progress = load(trained.path, 22).state.progress
    progress["plateau"]["factor"] = 0.5
    rewrite_checkpoint(trained.path, 22, progress=progress)
    resume(trained.path, server, keep_checkpoints=4)
    found = audit(trained, server)
    assert found.step == 22
    assert "numbers of the schedule and others in the checkpoint of step 22" in str(
        found.mismatch
    )


@pytest.mark.parametrize("what", ["frozen tensors", "names and shapes of the tensors"])
def test_forged_final_weights_that_no_vector_has_are_found(
    own: Own, train: Train, server: ForkServer, what: str
) -> None:
    """Frozen tensors are in files only; names decide where numbers of a vector go."""
    run = train(own(EVERYTHING, arithmetic="torch"), 1)
    last = kept(run.path)[-1]
    old = load(run.path, last)
    if what == "frozen tensors":
        frozen = dict(old.state.constants)
        frozen["scale"] = np.negative(frozen["scale"])
        rewrite_checkpoint(run.path, last, constants=frozen)
    else:
        layout = old.manifest.layout
        entries = {entry.name: entry for entry in layout.parameters}
        swap = {
            "norm.weight": entries["norm.bias"],
            "norm.bias": entries["norm.weight"],
        }
        parameters = tuple(swap.get(name, entry) for name, entry in entries.items())
        forged = layout.model_copy(update={"parameters": parameters})
        rewrite_checkpoint(run.path, last, manifest={"layout": forged})
    rewrite_model(run.path)
    assert f"the {what} in the checkpoint of step {last} differ" in str(
        audit(run, server).mismatch
    )


def test_a_swapped_checkpoint_is_found(trained: Run, server: ForkServer) -> None:
    directory = checkpoint.directory_of(trained.path)
    shutil.rmtree(directory / "step-22")
    shutil.copytree(directory / "step-11", directory / "step-22")
    found = audit(trained, server)
    assert "step-22 is of another step" in str(found.mismatch)


def test_other_final_weights_are_found(
    trained: Run, train: Train, server: ForkServer
) -> None:
    other = train(TORCH.changed({"seed": 5}), 1)
    shutil.copy(other.model_file, trained.model_file)
    assert "is not the result of the checkpoint of step 44" in str(
        audit(trained, server).mismatch
    )


def test_another_learning_rate_after_a_resume_is_found(
    trained: Run, server: ForkServer
) -> None:
    """Whether the recipe says so or not."""
    recipe, hidden = trained.path / "recipe.toml", trained.recipe
    forget_after(trained.path, 22)
    recipe.write_text(hidden.changed({"optimizer.lr": 5e-4}).to_toml())
    resume(trained.path, server, allow_different_numerics=True, keep_checkpoints=4)
    found = audit(trained, server)
    assert found.step == 11
    assert "of another recipe: recipe optimizer.lr" in str(found.mismatch)


FAULTY = """
import pathlib

def load():
    x = torch.arange(96.0).reshape(96, 1) / 96
    return {"train": (x, 3 * x), "test": (x, 3 * x)}

def flipped(x):
    return (x.contiguous().view(torch.int32) ^ (1 << 20)).view(torch.float32)

class Faulty(torch.nn.Linear):
    def forward(self, x):
        hit = (x == 7 / 96) if pathlib.Path("FILE").exists() else None
        fault = pathlib.Path("FILE").read_text() if hit is not None else ""
        if fault == "sample":
            x = torch.where(hit, flipped(x), x)
        y = super().forward(x)
        if fault == "gradient" and y.requires_grad:
            y.register_hook(lambda g: torch.where(hit, flipped(g), g))
        return y

def build():
    return Faulty(1, 1)
"""


@pytest.mark.parametrize("fault", ["sample", "gradient"])
def test_one_bit_of_a_sample_or_a_gradient_is_found_at_its_step(
    own: Own, train: Train, server: ForkServer, tmp_path: Path, fault: str
) -> None:
    """It happens once in an epoch of 4 steps, with the sample 7."""
    file = tmp_path / "fault"
    code = FAULTY.replace("FILE", str(file))
    recipe = own(code, arithmetic="torch", epochs=2, loss={"name": "squared-error"})
    clean = train(recipe, 1, probe=False)
    assert audit(clean, server).mismatch is None
    file.write_text(fault)
    faulty = train(recipe, 1, probe=False)
    file.unlink()
    one, other = (
        ledger.parse((run.path / "ledger").read_bytes()).records
        for run in (clean, faulty)
    )
    (wrong, *_) = (one != other).any(axis=1).nonzero()[0]
    found = audit(faulty, server)
    assert found.step == wrong + 1
    assert "the hash of its gradient" in str(found.mismatch)


def test_torch_arithmetic_of_another_machine_is_not_called_a_mismatch(
    trained: Run, server: ForkServer
) -> None:
    for step in (11, 22, 33, 44):
        elsewhere(trained, step, {"processor": "Other 1"})
    with pytest.raises(RunError, match="These differ: processor: Other 1 then, "):
        audit(trained, server)


def test_portable_arithmetic_of_another_machine_is_computed_again(
    train: Train, server: ForkServer
) -> None:
    run = train(PORTABLE, 1)
    elsewhere(run, 44, {"processor": "Other 1", "torch": "9.9"})
    assert audit(run, server).mismatch is None


def test_code_that_only_the_run_names_is_not_run(
    trained: Run, server: ForkServer
) -> None:
    text = (trained.path / "recipe.toml").read_text()
    start = text.index("[model]")
    end = text.index("\n[", start)
    forged = '[model]\nfamily = "custom"\nbuild = "os:getcwd"\n'
    (trained.path / "recipe.toml").write_text(text[:start] + forged + text[end:])
    recipe = Recipe.load(trained.path / "recipe.toml")
    rewrite_ledger(trained.path, recipe=recipe)
    rewrite_result(trained.path, status="interrupted")
    shutil.rmtree(checkpoint.directory_of(trained.path))
    with pytest.raises(samestep.OwnCodeError, match="only a file names"):
        audit(trained, server)


def test_a_run_without_a_ledger_cannot_be_audited(
    trained: Run, server: ForkServer
) -> None:
    result = json.loads((trained.path / "result.json").read_text())
    del result["ledger_sha256"]
    (trained.path / "result.json").write_text(json.dumps(result))
    with pytest.raises(RunError, match="has none"):
        audit(trained, server)


def test_the_command_exits_with_1_for_a_mismatch(trained: Run) -> None:
    (trained.path / "ledger").write_bytes(b"")
    ended = CliRunner().invoke(cli, ["audit", str(trained.path)])
    assert ended.exit_code == 1
    assert ended.output == "mismatch    the ledger cannot be used: it has no header\n"


@pytest.mark.parametrize("kind", ["stream", "state"])
def test_a_training_on_a_stream_is_audited_at_any_placement(
    own: Own, train: Train, server: ForkServer, kind: str
) -> None:
    """Each checkpoint says where the stream goes on, with which generators."""
    fields = {"global_batch": 16, "data.arguments": {"kind": kind}}
    run = train(own(STREAMS, epochs=2, **fields), 2, keep_checkpoints=4)
    assert len(kept(run.path)) > 1
    for workers in (1, 3):
        assert audit(run, server, workers=workers).mismatch is None
