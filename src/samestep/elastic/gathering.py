"""The workers of one generation and what they tell each other in their store."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store

from samestep.core.topology import Topology
from samestep.elastic import briefing, tcp_store
from samestep.elastic.membership import START_SECONDS, Roster, wait
from samestep.errors import PeerLost
from samestep.messages.job import Briefing, TrainingJob
from samestep.verification.probe import Witness


PREPARE_SECONDS = 3600.0
"""Deadline for every machine to have its data checked and its state received; when one
dies, torchrun ends the others much earlier."""
PART_SECONDS = 10.0


@dataclass(frozen=True)
class Meeting:
    """One worker's access to what this generation says."""

    topology: Topology
    store: Store
    """Fresh: nobody else has ever used its prefix."""
    pause: Callable[[], None]
    """Between two looks; may raise, as when this worker is told to stop."""
    name: str = ""
    """Of the generation."""
    witness: Witness | None = None
    """Of the first worker, if the training is probed."""

    @classmethod
    def join(
        cls, topology: Topology, pause: Callable[[], None], witness: Witness | None
    ) -> "Meeting":
        """All workers. Raises PeerLost, OSError, torch's DistError."""
        shared = _open_store(topology)
        prefix = Roster(shared, topology.rank, topology.workers, pause=pause).agree()
        return cls(topology, PrefixStore(prefix, shared), pause, prefix, witness)

    def tell(self, topic: str, value: Any) -> list[Any]:
        """All leaders: everybody's plain JSON value, by node. Raises PeerLost."""
        self.store.set(f"{topic}/{self.topology.node}", json.dumps(value))
        return [self._hear(f"{topic}/{node}") for node in range(self.topology.nodes)]

    def brief(
        self,
        job: TrainingJob,
        environment: Mapping[str, str],
        descriptors: Mapping[str, int],
    ) -> None:
        """Send a job, variables and descriptors to the other workers of this node."""
        message = Briefing(
            job=job, environment=dict(environment), names=list(descriptors)
        )
        others, fds = self.topology.local_workers - 1, list(descriptors.values())
        briefing.give(self._socket, message, fds, others, self.pause)

    def briefing(self) -> tuple[Briefing, dict[str, int]]:
        """Return what the leader of this node has sent. Raises PeerLost."""
        return briefing.take(self._socket, self.pause)

    @property
    def _socket(self) -> str:
        """Its name: of this job, node and generation, as several may be on a host."""
        topology = self.topology
        return f"{topology.address}:{topology.port}/{topology.node}/{self.name}"

    def part(self) -> None:
        """All leaders, after an error that all of them have found.

        Rank 0 may serve the store: it stays until the others have read what they need.
        """
        topology = self.topology
        if topology.rank != 0:
            self.store.set(f"parted/{topology.node}", "")
            return
        keys = [f"parted/{node}" for node in range(1, topology.nodes)]
        with contextlib.suppress(PeerLost):  # they have left in another way
            missing = "the others' farewell"
            wait(
                lambda: self.store.check(keys),
                self.pause,
                lambda: missing,
                PART_SECONDS,
            )

    def workers_store(self) -> Store:
        """For the exchange."""
        return PrefixStore("exchange", self.store)

    def _hear(self, key: str) -> Any:
        wait(
            lambda: self.store.check([key]),
            self.pause,
            lambda: f"`{key}`",
            PREPARE_SECONDS,
        )
        return json.loads(self.store.get(key))


def _open_store(topology: Topology) -> Store:
    """torchrun says whether it serves one; if not, rank 0 does."""
    where = topology.address, topology.port, START_SECONDS
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if topology.rank == 0 and not is_served:
        return tcp_store.serve(*where)
    return tcp_store.connect(*where)
