"""How a worker finds the others, and which exchange they make together."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import DistStoreError

from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.errors import WorkerLate
from samestep.exchange import Exchange
from samestep.exchange.compression import Compression
from samestep.exchange.hierarchical import NodeGroup, NodesExchange
from samestep.exchange.shared import SharedExchange
from samestep.state.flat import Flat


@dataclass(frozen=True)
class Connection:
    """Called with a model's vectors and everybody's micro-batches by all workers."""

    exchange: str
    """`shared` (between nodes over Gloo), `gloo` or `nccl`."""
    topology: Topology
    timeout_seconds: float
    """Whoever waits longer for a peer gives up."""
    start_seconds: float
    """The same before the first step: others may still load data."""
    spin_seconds: float
    compression: Compression
    memory: int | None
    """For `shared`: the descriptor of this node's memory, which `barrier.create` made
    for its workers."""
    store: Callable[[], Store]
    """The store of this generation of workers, in which they have left nothing yet.
    It is not called where shared memory is enough."""

    def __call__(self, flat: Flat, shares: list[Range]) -> Exchange:
        """`shares[r]` is the range of micro-batches of worker `r`, without gaps."""
        if self.exchange == "shared":
            return self._shared(flat, shares)
        # DDP imports torch._dynamo, 0.9 s: only who needs it pays.
        from samestep.exchange.gloo import GlooExchange, join

        join(self.exchange, self.topology, self.timeout_seconds, self._met())
        return GlooExchange(flat, shares, self.topology, self.compression)

    def _shared(self, flat: Flat, shares: list[Range]) -> Exchange:
        assert self.memory is not None
        topology, timeout = self.topology, self.timeout_seconds
        if not topology.is_leader and topology.nodes > 1:
            # The leader knows which node is late: it is to say so first.
            timeout *= 2
        where = flat, shares, topology
        spin, compression = self.spin_seconds, self.compression
        within = SharedExchange(
            *where, self.memory, spin, timeout, compression, self.start_seconds
        )
        if topology.nodes == 1:
            return within
        nodes = NodeGroup.meet(topology, self._met(), timeout)
        return NodesExchange(*where, within, self.memory, nodes)

    def _met(self) -> Store:
        """All workers: the store, once all of them have come. Raises WorkerLate."""
        store, seconds = self.store(), max(self.start_seconds, self.timeout_seconds)
        keys = [f"built/{rank}" for rank in range(self.topology.workers)]
        store.set(keys[self.topology.rank], "")
        try:
            store.wait(keys, timedelta(seconds=seconds))
        except DistStoreError:
            late = [str(r) for r, key in enumerate(keys) if not store.check([key])]
            raise WorkerLate(
                f"Every worker must have loaded its data and built its model within "
                f"{seconds:g} s; late: worker {', '.join(late)}. If it only needs more "
                "time, raise `--start-timeout`."
            ) from None
        return store


def tcp_store(topology: Topology, listen_fd: int | None, seconds: float) -> Store:
    """All workers; rank 0 serves it on a listening socket, within so many seconds."""
    return TCPStore(
        topology.address,
        topology.port,
        topology.workers,
        is_master=topology.rank == 0,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
