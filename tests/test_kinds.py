"""Other people's code: exact, or refused with the reason, but never silently different.

Every kind is trained by one worker undisturbed; by two, one of which is killed; and, if
there is something to go on with, by three in another process. `make kinds` tries them
at every placement and after every kill.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import fault
from kinds.table import KINDS
from kinds_trials import MIDDLE, Outcome, Trial, judge

from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import fault_injection


PLACEMENTS = list(itertools.product((1, 2, 3), ("shared", "gloo")))
CRASHING = ("frozen norm", "vocabulary of a set")
"""Those that lose more than workers each time; a new fork server takes seconds."""
Under = Callable[..., Outcome]


@pytest.fixture(scope="module")
def other() -> Iterator[ForkServer]:
    """As another command has one: other hashes, other states of generators."""
    with ForkServer() as running:
        yield running


@pytest.fixture(scope="module")
def mortal() -> Iterator[ForkServer]:
    """To be killed; starts again by itself."""
    with ForkServer() as running:
        yield running


@pytest.fixture
def killed(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """`killed(trial, workers, exchange, times)`: workers end by SIGKILL."""

    def run(
        trial: Trial, workers: int, exchange: str = "shared", times: int = 1
    ) -> Outcome:
        schedule = [
            fault("kill", "update", MIDDLE, rank=0),
            fault("kill", "forward", 4, rank=workers - 1, number=2),
        ][:times]
        file = tmp_path / "faults.json"
        file.write_text(json.dumps(schedule))
        with monkeypatch.context() as patch:
            patch.setenv(fault_injection.SCHEDULE, str(file))
            return trial.train(
                server, workers, exchange, how="workers killed", prefetch="auto"
            )

    return run


@pytest.fixture(params=KINDS, ids=lambda name: name.replace(" ", "-"))
def trial(request: Any, tmp_path: Path) -> Trial:
    """A trial of each kind."""
    return Trial(request.param, tmp_path)


def test_a_kind_is_exact_or_refused_with_the_reason(
    trial: Trial, killed: Under, server: ForkServer, other: ForkServer
) -> None:
    alone = trial.train(server, 1)
    outcomes = [alone, killed(trial, 2)]
    if alone.result:
        outcomes.append(trial.resume_from_middle(other, alone))
    judge(trial.kind, outcomes)


@pytest.mark.full
def test_a_kind_is_exact_or_refused_at_every_placement_after_every_kill(
    trial: Trial,
    killed: Under,
    server: ForkServer,
    other: ForkServer,
    mortal: ForkServer,
) -> None:
    outcomes = [
        trial.train(server, workers, exchange, balance=balance)
        for workers, exchange in PLACEMENTS
        for balance in ("off", "random")
    ]
    outcomes += itertools.starmap(lambda *where: killed(trial, *where, 2), PLACEMENTS)
    outcomes += [
        trial.lose_the_fork_server(mortal, 2, "shared"),
        trial.lose_the_fork_server(mortal, 3, "gloo"),
        trial.lose_everything(other),
        trial.resume_from_middle(other, outcomes[0]),
    ]
    judge(trial.kind, outcomes)


@pytest.mark.parametrize("trial", CRASHING, indirect=True)
def test_the_loss_of_the_fork_server_and_of_everything_is_not_silent_either(
    trial: Trial, server: ForkServer, other: ForkServer, mortal: ForkServer
) -> None:
    outcomes = [
        trial.train(server, 1),
        trial.lose_the_fork_server(mortal, 2, "shared"),
        trial.lose_everything(other),
    ]
    judge(trial.kind, outcomes)
