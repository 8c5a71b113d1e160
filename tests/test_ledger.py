"""The ledger of a run: the same bytes wherever and however often steps are computed."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from conftest import Train, fault, small_recipe
from test_resume import forget_after, resume

import samestep
from samestep import Run, RunError
from samestep.kernels.library import VARIABLE, supported_isas
from samestep.output import ledger
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.state.hashing import hash_of
from samestep.supervisor.forkserver_client import ForkServer


RECIPE = small_recipe(epochs=2, model__norm="batch", optimizer__max_grad_norm=1.0)
PORTABLE = small_recipe(epochs=2, arithmetic="portable")


def content(run: Run) -> bytes:
    return (run.path / "ledger").read_bytes()


@pytest.mark.parametrize("recipe", [RECIPE, PORTABLE])
def test_a_ledger_has_the_same_bytes_with_any_workers_and_exchange(
    train: Train, recipe: samestep.Recipe
) -> None:
    first = train(recipe, 1)
    places = [(2, "gloo"), (3, "shared")]
    others = [train(recipe, n, exchange=exchange) for n, exchange in places]
    assert {content(run) for run in others} == {content(first)}
    assert {run.result["ledger_sha256"] for run in (first, *others)} == {
        ledger.parse(content(first)).head.hex()
    }


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_zeros_have_one_sign_in_a_ledger(train: Train, micro_batches: int) -> None:
    """Of one sample, a product may be a negative zero over one of the exchanges."""
    samples = {"global_batch": micro_batches, "micro_batches": micro_batches}
    recipe = small_recipe(max_steps=8, **samples)
    over = {how: content(train(recipe, 1, exchange=how)) for how in ("gloo", "shared")}
    assert over["gloo"] == over["shared"]


def test_a_ledger_has_the_hashes_of_all_steps(train: Train) -> None:
    """Those of a checkpoint's parameters among them."""
    run = train(RECIPE, 2)
    read = ledger.parse(content(run))
    assert read.is_whole
    assert read.recipe_digest == RECIPE.digest
    assert read.records[:, 0].tolist() == list(range(1, 23))
    assert len(np.unique(read.records[:, 1:])) == 44
    directory = checkpoint.directory_of(run.path)
    for step in checkpoint.steps(directory):
        state = checkpoint.load(checkpoint.path_of(directory, step)).state
        assert hash_of(state.parameters) == read.records[step - 1, 2]


def test_other_gradients_and_parameters_have_other_hashes(train: Train) -> None:
    lower = RECIPE.changed({"optimizer.lr": 1e-4})
    one, other = (ledger.parse(content(train(r, 1))).records for r in (RECIPE, lower))
    assert one[0, 1] == other[0, 1]  # the first gradient is that of the same weights
    assert one[0, 2] != other[0, 2]
    assert (one[1:, 1:] != other[1:, 1:]).all()


@pytest.mark.parametrize(
    ("recipe", "exchange"), [(RECIPE, "gloo"), (PORTABLE, "shared")]
)
def test_kills_leave_no_trace_in_a_ledger(
    train: Train, train_under: Train, recipe: samestep.Recipe, exchange: str
) -> None:
    schedule = [
        fault("kill", "update", 3, rank=1),
        fault("kill", "snapshot", 11, rank=0, number=2),
        fault("kill", "exchange", 17, rank=1, number=3),
    ]
    run = train_under(recipe, schedule, 2, exchange=exchange)
    assert run.result["restarts"] == 3
    assert content(run) == content(train(recipe, 1))


@pytest.mark.parametrize("recipe", [RECIPE, PORTABLE])
def test_a_resumed_run_continues_its_ledger(
    train: Train, server: ForkServer, recipe: samestep.Recipe
) -> None:
    run = train(recipe, 2, keep_checkpoints=2)
    whole, sha256 = content(run), run.result["ledger_sha256"]
    forget_after(run.path, 11)
    again = resume(run.path, server, 3, exchange="gloo")
    assert content(again) == whole
    assert again.result["ledger_sha256"] == sha256


def test_a_ledger_that_a_kill_has_cut_is_continued(
    train: Train, server: ForkServer
) -> None:
    run = train(RECIPE, 1, keep_checkpoints=2)
    whole = content(run)
    forget_after(run.path, 11)
    (run.path / "ledger").write_bytes(whole[:-100])
    assert content(resume(run.path, server)) == whole


def test_more_epochs_continue_the_ledger_of_the_longer_recipe(
    train: Train, server: ForkServer
) -> None:
    constant = RECIPE.changed({"schedule.name": "constant"})
    run = train(constant, 1)
    longer = resume(run.path, server, epochs=3)
    assert content(longer) == content(train(constant.changed({"epochs": 3}), 2))


def test_a_damaged_ledger_is_not_continued(train: Train, server: ForkServer) -> None:
    run = train(RECIPE, 1, keep_checkpoints=2)
    forget_after(run.path, 11)
    edited = bytearray(content(run))
    edited[100] ^= 1
    (run.path / "ledger").write_bytes(edited)
    with pytest.raises(RunError, match="chain of hashes is broken after step 0"):
        resume(run.path, server)
    (run.path / "ledger").unlink()
    assert resume(run.path, server).result["ledger_sha256"] is None


def test_a_ledger_that_lacks_steps_ends_with_a_warning(
    train: Train, server: ForkServer, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(RECIPE, 1, keep_checkpoints=2)
    cut = content(run)[: ledger.HEADER.size + 8 + 24 + 32]
    forget_after(run.path, 11)
    (run.path / "ledger").write_bytes(cut)
    again = samestep.resume(run.path, workers=1, server=server)
    assert again.result["ledger_sha256"] is None
    assert content(again) == cut
    assert "lacks the steps from 2 to 11" in caplog.text


@pytest.mark.parametrize("isa", supported_isas())
def test_instruction_sets_give_one_ledger(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its SHA-256 was the same on all processors that were tried."""
    monkeypatch.setenv(VARIABLE, isa)
    recipe = small_recipe(arithmetic="portable")
    run = samestep.train(recipe, workers=2, out=tmp_path / "run", view=SilentView())
    assert hashlib.sha256(content(run)).hexdigest() == (
        "bf8e6165e1fce2744c807721e81206e40f1730248014b2d0a9d85c7245ae4994"
    )


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        (b"", "no header"),
        (b"samestep".ljust(56), "not that of this version"),
        (ledger.header_of("00" * 32) + b"\xff" * 8, "has 18446744073709551615 records"),
        (ledger.header_of("00" * 32) + bytes(8), "has 0 records"),
    ],
)
def test_what_is_no_ledger_is_refused(damaged: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ledger.parse(damaged)


def test_steps_of_a_ledger_are_consecutive() -> None:
    header = ledger.header_of("00" * 32)
    records = np.array([[2, 5, 6]], np.uint64)
    chunk = ledger.chunk_of(records, ledger.head_of(header))
    with pytest.raises(ValueError, match="not consecutive after step 0"):
        ledger.parse(header + chunk)
