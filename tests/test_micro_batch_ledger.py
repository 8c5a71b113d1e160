"""The ledger of micro-batches: the same hashes everywhere, and who was wrong."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import Train, fault, small_recipe
from faults import Planting
from forging import rewrite_ledger, rewrite_result
from planting import Fault
from test_ledger import content
from test_resume import forget_after, resume

import samestep
from samestep import PlacementError, Recipe, Run, RunError
from samestep.elastic import node_state
from samestep.output import ledger
from samestep.output.console import SilentView
from samestep.output.run import Settings
from samestep.output.run_writer import RunWriter
from samestep.supervisor import blame
from samestep.supervisor.blame import WrongMicroBatch
from samestep.supervisor.forkserver_client import ForkServer


TORCH = small_recipe(
    data__train_samples=963, optimizer__max_grad_norm=1.0, compression="bf16"
)
"""The last of 11 steps has micro-batches of one sample, and some of none."""
PORTABLE = small_recipe(arithmetic="portable", model__norm="batch")
OPTION: dict[str, Any] = {"ledger": "micro-batches"}


def recorded(run: Run) -> ledger.Records:
    """Return hash and worker of every micro-batch: [steps, micro-batches, 2]."""
    found = ledger.parse((run.path / ledger.MICRO_BATCHES).read_bytes(), 12)
    assert found.is_whole
    assert found.recipe_digest == run.recipe.digest
    assert found.head.hex() == run.result["micro_batch_ledger_sha256"]
    assert found.records[:, 0].tolist() == list(range(1, len(found.records) + 1))
    return found.records[:, 1:].reshape(-1, 6, 2)


@pytest.mark.parametrize("recipe", [TORCH, PORTABLE], ids=["torch", "portable"])
def test_micro_batches_have_the_same_hashes_at_any_placement_and_after_kills(
    train: Train, train_under: Train, recipe: Recipe
) -> None:
    plain, alone = train(recipe, 1), train(recipe, 1, **OPTION)
    kills = [
        fault("kill", "exchange", 3, rank=1),
        fault("kill", "update", 7, rank=0, number=2),
    ]
    others = [
        train(recipe, 3, balance="random", verify=0.5, **OPTION),
        train_under(recipe, kills, 2, exchange="gloo", **OPTION),
    ]
    assert not (plain.path / ledger.MICRO_BATCHES).exists()
    assert {content(run) for run in (alone, *others)} == {content(plain)}
    hashes = recorded(alone)[..., 0]
    assert len(np.unique(hashes[:10])) == 10 * 6
    for run in others:
        assert (recorded(run)[..., 0] == hashes).all()
    by_one, by_three, killed = (recorded(r)[..., 1] for r in (alone, *others))
    assert not by_one.any()
    assert set(np.unique(by_three)) == {0, 1, 2}
    assert (killed == [0, 0, 0, 1, 1, 1]).all()
    # Neighbours belong to one worker or to the next, and not to the same in each step.
    assert (np.diff(by_three.astype(np.int64)) >= 0).all()
    assert len(np.unique(by_three, axis=0)) > 1


def test_a_resumed_run_goes_on_with_its_ledger_of_micro_batches(
    train: Train, server: ForkServer
) -> None:
    recipe = PORTABLE.changed({"epochs": 2, "schedule.name": "constant"})
    run = train(recipe, 2, **OPTION)
    before = recorded(run)
    forget_after(run.path, 11)
    file = run.path / ledger.MICRO_BATCHES
    file.write_bytes(file.read_bytes()[:-100])
    again = recorded(resume(run.path, server, 3))
    assert (again[..., 0] == before[..., 0]).all()
    assert (again[:11] == before[:11]).all()
    assert again[11:, :, 1].max() == 2
    longer = resume(run.path, server, epochs=3)
    assert len(recorded(longer)) == 33
    assert samestep.audit(longer, workers=2, full=True, server=server).mismatch is None


def test_a_ledger_of_micro_batches_begins_with_the_first_step(
    train: Train, server: ForkServer
) -> None:
    run = train(PORTABLE.changed({"epochs": 2}), 1)
    forget_after(run.path, 11)
    with pytest.raises(RunError, match=r"begins with the first step; .* after step 11"):
        resume(run.path, server, **OPTION)


def test_a_machine_knows_which_ledgers_have_all_steps_of_its_state(
    train: Train,
) -> None:
    recipe = PORTABLE.changed({"epochs": 2})
    one, two = (train(recipe, workers, **OPTION).path for workers in (1, 2))
    forget_after(one, 11)
    forget_after(two, 11)

    def recorded(run: Path) -> dict[str, str]:
        held = node_state.newest(run)
        assert held is not None
        assert held.state.step == 11
        return held.recorded

    whole = recorded(one)
    assert all(whole.values())
    assert whole[ledger.FILE] == recorded(two)[ledger.FILE]
    assert whole[ledger.MICRO_BATCHES] != recorded(two)[ledger.MICRO_BATCHES]
    file = one / ledger.MICRO_BATCHES
    content = file.read_bytes()
    file.write_bytes(content[:-100])  # a part of the second epoch
    assert recorded(one) == whole
    for damaged in (b"", content[: ledger.HEADER.size], content[:-1] + b"x"):
        file.write_bytes(damaged)
        assert recorded(one) == whole | {ledger.MICRO_BATCHES: ""}
    file.unlink()
    assert recorded(one) == {ledger.FILE: whole[ledger.FILE]}


@pytest.mark.parametrize("kind", ["steps", "micro-batches"])
def test_a_machine_that_is_behind_has_the_ledgers_of_another(
    trained: Path, tmp_path: Path, kind: Literal["steps", "micro-batches"]
) -> None:
    """And no longer its own, where the run has none of micro-batches."""
    files = ledger.FILES if kind == "micro-batches" else (ledger.FILE,)
    received = {name: (trained / name).read_bytes() for name in files}
    run = tmp_path / "behind"
    run.mkdir()
    for name in ledger.FILES:
        (run / name).write_bytes(b"older")
    placement = samestep.Placement(workers=1, ledger=kind)
    with RunWriter.reopen(run, Settings.of(PORTABLE, placement), 0.0) as writer:
        writer.rewind(11, [], ("", received))
    found = {file.name: file.read_bytes() for file in run.glob("ledger*")}
    assert found == received


def test_more_micro_batches_than_a_snapshot_has_room_for_are_refused() -> None:
    placement = samestep.Placement(workers=1, ledger="micro-batches")
    assert placement.resolve(128)[0].ledger == "micro-batches"
    with pytest.raises(PlacementError, match=r"room for 128 of them; .* has 129"):
        placement.resolve(129)


@pytest.fixture(scope="module")
def planting() -> Iterator[Planting]:
    """A fork server whose workers may have a fault."""
    import faults

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(faults.__file__).parent), prepend=":")
        with Planting() as running:
            yield running


@pytest.mark.parametrize("recipe", [TORCH, PORTABLE], ids=["torch", "portable"])
def test_an_audit_names_the_micro_batch_that_a_worker_skipped(
    server: ForkServer, planting: Planting, tmp_path: Path, recipe: Recipe
) -> None:
    planting.fault = Fault("skip", step=5, rank=1, seed=3)
    try:
        run = samestep.train(
            recipe,
            workers=2,
            out=tmp_path / "run",
            view=SilentView(),
            server=planting,
            **OPTION,
        )
    finally:
        planting.fault = None
    ((hash_of_nothing, worker),) = recorded(run)[4][recorded(run)[4, :, 0] == 0]
    assert (hash_of_nothing, worker) == (0, 1)
    number = recorded(run)[4, :, 0].tolist().index(0)
    found = samestep.audit(run, workers=3, full=True, server=server)
    assert (found.step, found.micro_batches) == (5, [WrongMicroBatch(number, 1)])
    assert "step 5 differs when it is computed again" in str(found.mismatch)
    end = f"; micro-batch {number} is wrong, which worker 1 computed"
    assert str(found.mismatch).endswith(end)


def test_an_audit_says_that_all_micro_batches_are_right_if_their_sum_is_not(
    server: ForkServer, train_under: Train
) -> None:
    recipe = PORTABLE.changed({"model.norm": "none"})
    run = train_under(recipe, [fault("flip", "exchange", 4, rank=1)], 2, **OPTION)
    found = samestep.audit(run, workers=1, full=True, server=server)
    assert (found.step, found.micro_batches) == (5, [])
    assert str(found.mismatch).endswith(
        "; all micro-batches are right, so what came after them went wrong"
    )


@pytest.fixture(scope="module")
def original(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hashed") / "run"
    options: dict[str, Any] = {"view": SilentView(), "server": server} | OPTION
    return samestep.train(PORTABLE, workers=2, out=out, **options).path


@pytest.fixture
def trained(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "trained")


def test_a_forged_hash_of_a_micro_batch_is_found(
    trained: Path, server: ForkServer
) -> None:
    def change(records: ledger.Records) -> None:
        records[records[:, 0] == 7, 1 + 2 * 4] ^= np.uint64(1)

    rewrite_ledger(trained, change, name=ledger.MICRO_BATCHES)
    found = samestep.audit(trained, workers=1, full=True, server=server)
    assert (found.step, found.micro_batches) == (7, [WrongMicroBatch(4, 1)])
    assert found.mismatch == (
        "step 7 differs when it is computed again, though the ledger of steps is "
        "right; micro-batch 4 is wrong, which worker 1 computed"
    )


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda whole: whole[:-40], "ends in the middle of a chunk"),
        (lambda whole: whole[:100] + b"x" + whole[101:], "chain of hashes is broken"),
        (lambda whole: whole[: ledger.HEADER.size], "is not the one in result.json"),
        (lambda whole: whole.replace(b"samestep", b"sameness", 1), "header is not"),
    ],
)
def test_a_damaged_ledger_of_micro_batches_is_found(
    trained: Path, server: ForkServer, damage: Any, why: str
) -> None:
    file = trained / ledger.MICRO_BATCHES
    file.write_bytes(damage(file.read_bytes()))
    found = samestep.audit(trained, workers=1, full=True, server=server)
    assert "the ledger of micro-batches" in str(found.mismatch)
    assert why in str(found.mismatch)
    file.unlink()
    assert "ledger of micro-batches cannot be used" in str(
        samestep.audit(trained, workers=1, full=True, server=server).mismatch
    )


def test_a_ledger_of_micro_batches_of_fewer_steps_or_another_recipe_is_found(
    trained: Path, server: ForkServer
) -> None:
    file = trained / ledger.MICRO_BATCHES
    digest = samestep.Run.open(trained).recipe.digest
    for other, why in ((digest, "not as many steps"), ("00" * 32, "not the recipe of")):
        header = ledger.header_of(other, 12)
        file.write_bytes(header)
        closing = {"micro_batch_ledger_sha256": ledger.head_of(header).hex()}
        rewrite_result(trained, **closing)
        found = samestep.audit(trained, workers=1, full=True, server=server)
        assert why in str(found.mismatch)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ([(3, 1)], "micro-batch 3 is wrong, which worker 1 computed"),
        (
            [(0, 0), (1, 0), (2, 0), (5, 0), (6, 1), (7, 1)],
            "6 of 9 micro-batches are wrong: 0 to 2, 5 of worker 0; 6 to 7 of worker 1",
        ),
    ],
)
def test_wrong_micro_batches_are_listed_by_worker(
    wrong: list[tuple[int, int]], text: str
) -> None:
    assert blame.in_words([WrongMicroBatch(*each) for each in wrong], 9) == text
