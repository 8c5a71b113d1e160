"""The agents' store in a cluster of etcd, which outlives the loss of any machine.

With three members, say one on each of three machines, etcd goes on as long as two can
reach each other. It must serve its API of version 2 (`--enable-v2`, up to etcd 3.5), as
for torchrun's own backend `etcd-v2`.
"""

import time
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend
from torch.distributed.elastic.rendezvous.etcd_rendezvous_backend import (
    EtcdRendezvousBackend,
)
from torch.distributed.elastic.rendezvous.etcd_store import EtcdStore


NAME, PORT = "etcd-v2", 2379
PREFIX = "/samestep"
REQUEST_SECONDS = 2
"""Deadline of one request, which then is repeated: a member that has just lost the
leader would answer after 7."""
AGAIN_SECONDS = 0.2


class NoEtcdError(Exception):
    """etcd cannot be used; the message says why."""


def connect(
    host: str, port: int, run_id: str, seconds: float
) -> tuple[RendezvousBackend, Store]:
    """Connect to a cluster through any of its members. Raises NoEtcdError.

    For up to `seconds` a request is repeated, as while the members elect a leader.
    """
    try:
        import etcd
    except ModuleNotFoundError:
        raise NoEtcdError(
            "It needs python-etcd, which is not installed: `pip install "
            "'samestep[etcd]'`."
        ) from None

    no_majority = (
        etcd.EtcdConnectionFailed,
        etcd.EtcdLeaderElectionInProgress,
        etcd.EtcdException,  # "request timed out"
    )

    class Client(etcd.Client):  # type: ignore[misc]
        """Repeats requests that failed for want of a majority."""

        def api_execute(self, *given: Any, **options: Any) -> Any:
            return _patiently(
                lambda: super(Client, self).api_execute(*given, **options),
                lambda error: type(error) in no_majority,
                seconds,
            )

    try:
        client = Client(host, port, read_timeout=REQUEST_SECONDS, allow_reconnect=True)
    except etcd.EtcdException as error:
        raise NoEtcdError(f"{host}:{port} does not answer as etcd: {error}") from None
    backend = EtcdRendezvousBackend(client, run_id, key_prefix=f"{PREFIX}/rendezvous")
    return backend, EtcdStore(client, f"{PREFIX}/store/{run_id}")


def _patiently(
    request: Callable[[], Any], may_pass: Callable[[Exception], bool], seconds: float
) -> Any:
    """Repeat a request while its failures may pass, for up to `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            return request()
        except Exception as error:
            if not may_pass(error) or time.monotonic() > end:
                raise
            time.sleep(AGAIN_SECONDS)
