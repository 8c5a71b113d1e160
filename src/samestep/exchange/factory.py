"""How a worker finds the others, and which exchange they make together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import DistStoreError

from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.errors import WorkerLate
from samestep.exchange import Exchange
from samestep.exchange.compression import Compression
from samestep.exchange.gloo import HOST, GlooExchange, join
from samestep.exchange.hierarchical import NodesExchange
from samestep.exchange.shared import SharedExchange
from samestep.messages.job import Setup
from samestep.state.flat import Flat
from samestep.system.barrier import Waits


DONE = {
    "built": "loaded its data and built its model",
    "compiled": "compiled its model",
}
"""What workers have done before they meet, in words."""


@dataclass
class Connection:
    """Makes the exchange; all workers call it with their model's vectors."""

    setup: Setup
    topology: Topology
    compression: Compression
    memory: int | None
    """For `shared`: the descriptor of this node's memory, made by `barrier.create`."""
    store: Callable[[], Store]
    """Opens the empty store of this generation of workers; not called where shared
    memory is enough."""
    _opened: Store | None = field(default=None, init=False)

    def __call__(self, flat: Flat, shares: list[Range]) -> Exchange:
        """All workers: make the exchange.

        `shares[r]` is the range of micro-batches of worker `r`, without gaps.
        """
        if self.setup.exchange == "shared":
            return self._shared(flat, shares)
        join(self.setup, self.topology, self._met())
        carrier = flat.device if self.setup.exchange == "nccl" else HOST
        return GlooExchange(flat, shares, self.topology, self.compression, carrier)

    def _shared(self, flat: Flat, shares: list[Range]) -> Exchange:
        assert self.memory is not None
        topology, timeout = self.topology, self.setup.peer_timeout
        if not topology.is_leader and topology.nodes > 1:
            # The leader knows which node is late: let it raise its error first.
            timeout *= 2
        waits = Waits(self.setup.spin_seconds, timeout, self._start_seconds)
        within = SharedExchange(
            flat, shares, topology, self.memory, waits, self.compression
        )
        if topology.nodes == 1:
            return within
        store = self._met()
        return NodesExchange(
            flat, shares, topology, within, self.memory, store, timeout
        )

    @property
    def _start_seconds(self) -> float:
        """How long to wait before the first step, while others may still load data."""
        return self.setup.start_timeout + self.setup.peer_timeout

    def _met(self) -> Store:
        """All workers: wait until all are here; return the store. Raises WorkerLate."""
        self._opened = self.store()
        self.meet("built")
        return self._opened

    def meet(self, done: str) -> None:
        """All workers: wait until all have `done` a part of their start.

        Does nothing without a store: in shared memory the first waits may take as long.
        Raises WorkerLate.
        """
        store, seconds = self._opened, self._start_seconds
        if store is None:
            return
        keys = [f"{done}/{rank}" for rank in range(self.topology.workers)]
        store.set(keys[self.topology.rank], "")
        try:
            store.wait(keys, timedelta(seconds=seconds))
        except DistStoreError:
            late = [str(r) for r, key in enumerate(keys) if not store.check([key])]
            raise WorkerLate.naming(
                f"worker {', '.join(late)}",
                f"Every worker must have {DONE[done]}",
                seconds,
                "`--start-timeout`",
            ) from None


def tcp_store(topology: Topology, listen_fd: int | None, seconds: float) -> Store:
    """All workers: open the store, which rank 0 serves on a listening socket.

    An operation on it fails after `seconds`.
    """
    return TCPStore(
        topology.address,
        topology.port,
        topology.workers,
        is_master=topology.rank == 0,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
