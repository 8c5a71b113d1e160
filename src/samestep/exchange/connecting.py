"""How a worker finds the others, and which exchange they make together."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from samestep.exchange import Exchange
from samestep.exchange.nodes import Nodes, NodesExchange
from samestep.exchange.shared import SharedExchange
from samestep.flat import Flat
from samestep.place import Place
from samestep.rounding import Rounding
from samestep.tree import Node


START_TIMEOUT = timedelta(seconds=120)
"""How long at most a worker waits until all others have started."""


@dataclass(frozen=True)
class Connection:
    """Called with a model's vectors and everybody's micro-batches by all workers."""

    exchange: str
    """`shared` (between nodes over Gloo), `gloo` or `nccl`."""
    place: Place
    timeout_seconds: float
    """Whoever waits longer for a peer gives up."""
    spin_seconds: float
    rounding: Rounding
    memory: int | None
    """For `shared`: the descriptor of this node's memory, which `barrier.create` made
    for its workers."""
    store: Callable[[], Store]
    """The store of this generation of workers, in which they have left nothing yet.
    It is not called where shared memory is enough."""

    def __call__(self, flat: Flat, shares: list[Node]) -> Exchange:
        """`shares[r]` is the range of micro-batches of worker `r`, without gaps."""
        if self.exchange == "shared":
            return self._shared(flat, shares)
        # DDP imports torch._dynamo, 0.9 s: only who needs it pays.
        from samestep.exchange.gloo import GlooExchange, join

        join(self.exchange, self.place, self.timeout_seconds, self.store())
        return GlooExchange(flat, shares, self.place, self.rounding)

    def _shared(self, flat: Flat, shares: list[Node]) -> Exchange:
        assert self.memory is not None
        place, timeout = self.place, self.timeout_seconds
        if not place.is_leader and place.nodes > 1:
            # The leader knows which node is late: it is to say so first.
            timeout *= 2
        where = flat, shares, place
        spin, rounding = self.spin_seconds, self.rounding
        within = SharedExchange(*where, self.memory, spin, timeout, rounding)
        if place.nodes == 1:
            return within
        nodes = Nodes.meet(place, self.store(), timeout)
        return NodesExchange(*where, within, self.memory, nodes)


def tcp_store(place: Place, listen_fd: int | None) -> Store:
    """All workers; rank 0 serves it on a listening socket."""
    return TCPStore(
        place.address,
        place.port,
        place.workers,
        is_master=place.rank == 0,
        timeout=START_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
