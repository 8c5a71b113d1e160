"""Fixtures: one fork server for all trainings of a test session, small recipes."""

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from own_samples import HEAD
from pydantic import TypeAdapter
from xdist.scheduler import LoadScopeScheduling

import samestep
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import conditions, fault_injection


Train = Callable[..., samestep.Run]
Own = Callable[..., samestep.Recipe]
counter = itertools.count()


def pytest_configure() -> None:
    """Prepare what the programs that tests start inherit.

    They must receive SIGHUP and SIGINT, which `nohup` and a shell's `&` ignore. A
    program inherits an ignored signal, but not a handler, so a handler that does
    nothing replaces it. OpenMP threads sleep while they wait, so that other tests get
    the core.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in conditions.VARIABLES:  # a machine may choose kernels for all programs
        os.environ.pop(name, None)
    # An example may take any time on a busy machine.
    hypothesis.settings.register_profile("samestep", deadline=None)
    hypothesis.settings.load_profile("samestep")
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


SHARED = (
    *(
        "tests/test_design.py",
        "tests/test_distribution.py",
        "tests/test_doctor_peer.py",
    ),
    "tests/test_docs.py::test_the_site",
)
"""Beginnings of the names of tests that have an expensive set-up in common."""


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives tests one by one to the processes, and those of SHARED to one process.

    The marks `xdist_group` of pytest-xdist 3.8 have no effect in pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return next((name for name in SHARED if nodeid.startswith(name)), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Return what decides which process runs a test."""
    return Scheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the processes of `-n auto`: one more than cores, since tests also wait."""
    return len(os.sched_getaffinity(0)) + 1


LONGEST = (
    *("test_hosts", "test_elastic", "test_examples", "test_docs", "test_benchmarks"),
    *("test_exchange", "test_chaos", "test_faulty_disk", "test_loop", "test_meeting"),
    *("test_loop_exchange", "test_wrong_machine", "test_elastic_ledger"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no process waits for one in the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """One import of torch for all trainings of this process."""
    with ForkServer() as running:
        yield running


def small_recipe(**overrides: Any) -> samestep.Recipe:
    """Return the recipe of a short training: 1,000 images, a short last batch.

    Names are dotted with two underscores: `optimizer__lr=0.1`.
    """
    fields = {
        "epochs": 1,
        "global_batch": 96,
        "micro_batches": 6,
        "arithmetic": "torch",
        "data.train_samples": 1_000,
        "model.hidden": [37, 19],
        "model.dropout": 0.2,
    }
    if "max_steps" in overrides:
        del fields["epochs"]
    fields |= {name.replace("__", "."): value for name, value in overrides.items()}
    return samestep.Recipe.load("mnist-mlp", fields)


@pytest.fixture
def train(server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`train(recipe, workers, **placement)` in a new directory.

    Checkpoints are never left out for having taken long on a busy machine.
    """
    monkeypatch.setattr("samestep.supervisor.checkpoint_writer.WRITING_SHARE", 1e9)

    def run(
        recipe: samestep.Recipe,
        workers: int = 1,
        callbacks: Sequence[str] = (),
        **placement: Any,
    ) -> samestep.Run:
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        where = samestep.Placement(workers=workers, **({"out": out} | placement))
        options: dict[str, Any] = {"view": SilentView(), "server": server}
        return samestep.train(recipe, where, callbacks=callbacks, **options)

    return run


def fault(
    kind: str, point: str, step: int, rank: int, number: int = 1
) -> dict[str, Any]:
    """Return one entry of a schedule of faults; steps are counted from 0."""
    fields = {
        "number": number,
        "kind": kind,
        "point": point,
        "step": step,
        "rank": rank,
    }
    checked = TypeAdapter(fault_injection.Fault).validate_json(json.dumps(fields))
    return asdict(checked)


@pytest.fixture
def train_under(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`train_under(recipe, [fault, ...], workers, **placement)`.

    With a snapshot after every step.
    """

    def run(
        recipe: samestep.Recipe,
        schedule: list[dict[str, Any]],
        workers: int,
        **placement: Any,
    ) -> samestep.Run:
        file = tmp_path / "faults.json"
        file.write_text(json.dumps(schedule))
        monkeypatch.setenv(fault_injection.SCHEDULE, str(file))
        placement = {"snapshot_seconds": 1e-9} | placement
        try:
            return train(recipe, workers, **placement)
        finally:
            monkeypatch.delenv(fault_injection.SCHEDULE)

    return run


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    """`own(code, **fields)`: a recipe whose model and data are in `code`.

    Also its loss, optimizer and schedule, if there are any.

    Each module gets a new name, since the fork server may have imported the last one.
    """
    monkeypatch.chdir(tmp_path)

    def recipe(code: str, **fields: Any) -> samestep.Recipe:
        name = f"mine_{next(counter)}"
        (tmp_path / f"{name}.py").write_text(HEAD + code)
        sections: dict[str, Any] = {
            "data": {"source": "custom", "load": f"{name}:load"},
            "model": {"family": "custom", "build": f"{name}:build"},
        }
        if "def loss(" in code:
            sections["loss"] = {"name": "custom", "function": f"{name}:loss"}
        plain: dict[str, Any] = {
            "name": "own",
            "epochs": 1,
            "global_batch": 24,
            "micro_batches": 6,
            "optimizer": {"name": "adam", "lr": 0.01},
        }
        if "def optimizer(" in code:
            by = {"name": "custom", "build": f"{name}:optimizer", "lr": 0.01}
            sections["optimizer"] = by
        if "def schedule(" in code:
            by = {"name": "custom", "function": f"{name}:schedule"}
            sections["schedule"] = by
        return samestep.Recipe.from_dict({**plain, **sections}).changed(fields)

    return recipe
