"""The state that torchrun's agents share, over a store in memory."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousBackend,
    RendezvousSettings,
    RendezvousTimeout,
)

from samestep.elastic.rendezvous.heartbeats import LivingState


SETTINGS = RendezvousSettings(
    "job",
    min_nodes=1,
    max_nodes=4,
    timeout=RendezvousTimeout(last_call=timedelta(hours=1)),
    keep_alive_interval=timedelta(seconds=0.5),
    keep_alive_max_attempt=5,
)


class Memory(RendezvousBackend):
    """A backend with one state."""

    def __init__(self) -> None:
        self._state: bytes | None = None
        self._token = 0

    @property
    def name(self) -> str:
        return "memory"

    def get_state(self) -> tuple[bytes, Any] | None:
        return None if self._state is None else (self._state, self._token)

    def set_state(
        self, state: bytes, token: Any = None
    ) -> tuple[bytes, Any, bool] | None:
        is_newest = (token or 0) == self._token
        if is_newest:
            self._state, self._token = state, self._token + 1
        assert self._state is not None
        return self._state, self._token, is_newest


class Cluster:
    """What one agent sees of others, whose changes come from here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("samestep.elastic.rendezvous.heartbeats.time", self)
        self._backend = Memory()
        self._others = LivingState(self._backend, SETTINGS)
        self.agent = LivingState(self._backend, SETTINGS)

    def monotonic(self) -> float:
        """Stand in for the agent's clock."""
        return self.now

    def write(self, **values: Any) -> None:
        """Change the shared state, and let the agent look at it."""
        self._others.sync()
        for name, value in values.items():
            setattr(self._others.state, name, value)
        self._others.mark_dirty()
        self._others.sync()
        self.agent.sync()

    def beat(self, *nodes: str) -> None:
        """Let these machines send a heartbeat; all others stay silent."""
        beats = self._others.state.last_heartbeats
        self.write(last_heartbeats=beats | dict.fromkeys(nodes, self.now))

    @property
    def members(self) -> set[Any]:
        """Who takes part, as the agent sees it."""
        return set(self.agent.state.participants)

    @property
    def is_waiting(self) -> bool:
        """Whether the agent would wait for more machines."""
        deadline = self.agent.state.deadline
        return bool(deadline and deadline > datetime.now(UTC))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The machines a, b and c, in a complete round."""
    cluster = Cluster(monkeypatch)
    cluster.beat("a", "b", "c")
    cluster.write(participants={"a": 0, "b": 1, "c": 2}, complete=True)
    cluster.agent.expect_members()
    return cluster


def begin_round(cluster: Cluster, *joined: str) -> None:
    deadline = datetime.now(UTC) + timedelta(hours=1)
    participants = dict.fromkeys(joined, 0)
    cluster.write(complete=False, participants=participants, deadline=deadline)


def test_a_machine_is_lost_when_its_heartbeat_has_not_changed_for_seconds(
    cluster: Cluster,
) -> None:
    cluster.now += 2.4
    cluster.beat("a", "b")
    assert cluster.members == {"a", "b", "c"}
    cluster.now += 0.2
    cluster.beat("a", "b")
    assert cluster.members == {"a", "b"}


def test_a_round_is_complete_once_all_that_are_left_have_joined(
    cluster: Cluster,
) -> None:
    cluster.now += 2.6
    cluster.beat("a", "b")
    begin_round(cluster, "a")
    assert cluster.is_waiting
    begin_round(cluster, "a", "b")
    assert not cluster.is_waiting


def test_a_round_waits_for_a_machine_that_is_alive(cluster: Cluster) -> None:
    begin_round(cluster, "a", "b")
    assert cluster.is_waiting


def test_a_round_waits_for_a_machine_that_had_waited_for_it(cluster: Cluster) -> None:
    cluster.write(wait_list={"d"})
    begin_round(cluster, "a", "b", "c")
    assert cluster.is_waiting
    begin_round(cluster, "a", "b", "c", "d")
    assert not cluster.is_waiting


def test_the_first_round_waits_for_its_last_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(monkeypatch)
    cluster.beat("a", "b")
    begin_round(cluster, "a", "b")
    assert cluster.is_waiting


def test_a_machine_that_comes_waits_for_those_that_were_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would begin alone while they end their workers to meet it."""
    cluster = Cluster(monkeypatch)
    cluster.beat("a", "d")
    cluster.write(participants={"a": 0}, complete=True, wait_list={"d"})
    begin_round(cluster, "d")
    assert cluster.is_waiting
    begin_round(cluster, "a", "d")
    assert not cluster.is_waiting
