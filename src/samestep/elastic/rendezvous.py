"""A rendezvous of torchrun whose store listens on one address only.

torchrun's own backend, c10d, lets its store listen on all addresses of the machine; who
reaches it can run code there. `--rdzv-backend samestep` is the same rendezvous over a
store that listens where the others look for it, at the endpoint, and nowhere else.

It also makes rank 0 serve the store of the workers (`samestep.elastic`), likewise:
torchrun's would listen everywhere, and after the machine that serves it has left, some
agents still look for it there.
"""

import os
from collections.abc import Callable

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    DEFAULT_PORT,
    C10dRendezvousBackend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from samestep.elastic import store


EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  refused
NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
READ_SECONDS = 60
"""Deadline for an answer of the store, unless `--rdzv-conf read_timeout=...`."""


class Backend(C10dRendezvousBackend):
    """Under a name of its own, which torchrun compares with the one asked for."""

    @property
    def name(self) -> str:
        """What `--rdzv-backend` says."""
        return "samestep"


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun calls to learn how `--rdzv-backend samestep` is made."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """One agent's part. Raises RendezvousConnectionError."""
    os.environ[NO_SHARED_STORE] = "1"
    host, port = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
    seconds = parameters.get_as_int("read_timeout", READ_SECONDS) or READ_SECONDS
    if host in EVERYWHERE:
        raise RendezvousConnectionError(
            f"--rdzv-endpoint is an address of one machine, not {host}: the store "
            "would listen on all of them."
        )
    try:
        served = store.serve_or_connect(host, port, seconds)
    except (OSError, RuntimeError) as error:
        raise RendezvousConnectionError(
            f"The store of the rendezvous is at --rdzv-endpoint, {host}:{port}, and "
            f"cannot be reached: {error}. Start the machine with this address, too."
        ) from error
    backend = Backend(served, parameters.run_id)
    return create_handler(served, backend, parameters)
