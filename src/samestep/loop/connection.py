"""How the workers of a loop sum: in shared memory, or else over their process group."""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Literal, TypeVar

from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.errors import PlacementError
from samestep.exchange.gloo import GlooExchange
from samestep.exchange.shared import SharedExchange
from samestep.loop.changes import LoopFlat
from samestep.loop.overlap import OverlappingGloo
from samestep.loop.process_group import Group, gather
from samestep.system import barrier, log
from samestep.system.barrier import Waits
from samestep.system.peers import Address, Peers


T = TypeVar("T")
Choice = Literal["auto", "shared", "gloo"]
LoopExchange = SharedExchange | GlooExchange
USE_GLOO = 'Use `exchange="gloo"`; the result is the same.'


def connect(
    choice: Choice,
    flat: LoopFlat,
    shares: list[Range],
    rank: int,
    timeout_seconds: float,
) -> LoopExchange:
    """All workers: make the exchange. Raises PlacementError, on all of them.

    `shares[r]` is the range of micro-batches of worker `r`, without gaps. `auto` takes
    shared memory if all workers can map it; otherwise rank 0 says why not.
    """
    if choice not in ("auto", "shared", "gloo"):
        raise PlacementError(
            f"The exchange is `auto`, `shared` or `gloo`; received `{choice}`."
        )
    topology = Topology.on_one_node(rank, len(shares))
    # One worker alone exchanges nothing.
    if choice != "gloo" and len(shares) > 1:
        try:
            return _shared(flat, shares, topology, timeout_seconds)
        except PlacementError as error:
            if choice == "shared":
                raise PlacementError(
                    f"No memory is shared; {error} {USE_GLOO}"
                ) from None
            with log.shown_on_stderr():
                if rank == 0:
                    log.logger.info(
                        "exchange gloo, since no memory is shared; %s", error
                    )
    if len(shares) == 1:
        return GlooExchange(flat, shares, topology)
    hosts = gather(Group(len(shares)), rank, socket.gethostname())
    are_alone = len(set(hosts)) == len(hosts)
    return OverlappingGloo(flat, shares, topology, are_alone)


def _shared(
    flat: LoopFlat, shares: list[Range], topology: Topology, timeout_seconds: float
) -> SharedExchange:
    """All workers: make memory, and map that of rank 0.

    Raises PlacementError, on all workers, if one of them cannot.
    """
    rank, workers = topology.rank, topology.workers
    group = Group(workers)

    def offer() -> Address:
        fd = barrier.create(workers)
        opened.callback(os.close, fd)
        return Address.of(fd)

    def take() -> SharedExchange:
        fd = addresses[0].open()
        opened.callback(os.close, fd)
        peers = Peers({r: a.pid for r, a in enumerate(addresses) if r != rank})
        spin, option = barrier.spin_seconds(workers), "`timeout_seconds`"
        waits = Waits(spin, timeout_seconds, timeout_option=option, peers=peers)
        return SharedExchange(flat, shares, topology, fd, waits)

    with contextlib.ExitStack() as opened:  # until all have mapped it
        address = _agreed(group, rank, offer)
        addresses = [Address(*found) for found in gather(group, rank, address)]
        return _agreed(group, rank, take)


def _agreed(group: Group, rank: int, make: Callable[[], T]) -> T:
    """All workers: make something. Raises PlacementError, on all, if one cannot."""
    why = ""
    try:
        made = make()
    except (OSError, PlacementError) as error:
        why = str(error)
    for worker, reason in enumerate(gather(group, rank, why)):
        if reason:
            raise PlacementError(f"worker {worker}: {reason.rstrip('.')}.")
    return made
