"""How the workers of one generation meet and exchange values through their store."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store

from samestep.core.topology import Topology
from samestep.elastic import tcp_store
from samestep.elastic.membership import START_SECONDS, Roster, wait
from samestep.errors import PeerLost
from samestep.verification.probe import Witness


PREPARE_SECONDS = 3600.0
"""Deadline for every machine to check its data and receive its state; if one dies,
torchrun ends the others much earlier."""
PART_SECONDS = 10.0


@dataclass(frozen=True)
class Meeting:
    """One worker's access to its generation's store."""

    topology: Topology
    store: Store
    """A store whose prefix no earlier generation has used."""
    pause: Callable[[], None]
    """Called between two polls; may raise, for example when this worker is to stop."""
    name: str = ""
    """The name of the generation."""
    witness: Witness | None = None
    """The process that computes again for the probe; only rank 0 has one."""

    @classmethod
    def join(
        cls, topology: Topology, pause: Callable[[], None], witness: Witness | None
    ) -> "Meeting":
        """All workers: agree on a fresh store. Raises PeerLost, OSError, DistError."""
        shared = _open_store(topology)
        prefix = Roster(shared, topology.rank, topology.workers, pause=pause).agree()
        return cls(topology, PrefixStore(prefix, shared), pause, prefix, witness)

    def all_gather(self, topic: str, value: Any) -> list[Any]:
        """All leaders: return the JSON value of each node. Raises PeerLost."""
        self.store.set(f"{topic}/{self.topology.node}", json.dumps(value))
        keys = [f"{topic}/{node}" for node in range(self.topology.nodes)]
        self._wait_for(keys, PREPARE_SECONDS)
        return [json.loads(self.store.get(key)) for key in keys]

    @property
    def socket(self) -> str:
        """The name of the socket of this node's workers, see `briefing`.

        It has the job, the node and the generation, as a host may have several.
        """
        topology = self.topology
        return f"{topology.address}:{topology.port}/{topology.node}/{self.name}"

    def part(self) -> None:
        """All leaders: leave after an error that all of them have seen.

        Rank 0 may serve the store, so it stays until the others have read it.
        """
        topology = self.topology
        if topology.rank != 0:
            self.store.set(f"parted/{topology.node}", "")
            return
        keys = [f"parted/{node}" for node in range(1, topology.nodes)]
        with contextlib.suppress(PeerLost):  # some have ended without this message
            self._wait_for(keys, PART_SECONDS)

    def workers_store(self) -> Store:
        """Return the store in which the workers set up their exchange."""
        return PrefixStore("exchange", self.store)

    def _wait_for(self, keys: list[str], seconds: float) -> None:
        def missing() -> str:
            return ", ".join(f"`{key}`" for key in keys if not self.store.check([key]))

        wait(lambda: self.store.check(keys), self.pause, missing, seconds)


def _open_store(topology: Topology) -> Store:
    """Connect to torchrun's store, or to one that rank 0 serves."""
    where = topology.address, topology.port, START_SECONDS
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if topology.rank == 0 and not is_served:
        return tcp_store.serve(*where)
    return tcp_store.connect(*where)
