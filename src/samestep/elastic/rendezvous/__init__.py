"""A rendezvous of torchrun whose store listens on one address only.

The store of torchrun's own backend, c10d, listens on all addresses of the machine, and
anybody who can connect to it can run code there. `--rdzv-backend samestep` is the same
rendezvous over a store that listens at the endpoint and nowhere else, or, with
`--rdzv-conf store=etcd-v2`, over etcd.

It also makes rank 0 serve the store of the workers, for the same reason; and after the
machine that serves torchrun's has left, some agents would still look for it there.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    DEFAULT_PORT,
    C10dRendezvousBackend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousBackend,
    RendezvousSettings,
    RendezvousTimeout,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from samestep.elastic import tcp_store
from samestep.elastic.nodes import JOB
from samestep.elastic.rendezvous import etcd, forked
from samestep.elastic.rendezvous.handler import Rendezvous
from samestep.elastic.rendezvous.notices import (
    AGAIN_SECONDS,
    FIRST_SECONDS,
    refuse,
    say,
)


EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  refused
NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
READ_SECONDS = 60
"""Deadline of the store's operations; `--rdzv-conf read_timeout=...` changes it."""
JOIN_SECONDS = 600
"""Deadline for all machines to arrive; `--rdzv-conf join_timeout=...` changes it."""
KEEP_ALIVE_SECONDS, KEEP_ALIVE_ATTEMPTS = 0.5, 5
"""A machine is lost when it has not been heard of for the product; torchrun's defaults
are 5 and 3. `--rdzv-conf keep_alive_interval=...,keep_alive_max_attempt=...` changes
them. Heartbeats may come at twice the interval, or each second while machines meet."""
LOOK_SECONDS = 0.5


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return the factory of `--rdzv-backend samestep`; torchrun's entry point."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """Join the rendezvous as one agent; exit if the endpoint cannot be used."""
    os.environ[NO_SHARED_STORE] = "1"
    forked.let_torchrun_fork()
    in_etcd = parameters.get("store") == etcd.NAME
    default = etcd.PORT if in_etcd else DEFAULT_PORT
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default)
    backend, store = (_in_etcd if in_etcd else _served)(host, port, parameters)
    where = f"job {parameters.run_id}, at {host}:{port}"
    _check_job(store, parameters.run_id, where)
    seconds = partial(_seconds, parameters)
    settings = RendezvousSettings(
        parameters.run_id,
        parameters.min_nodes,
        parameters.max_nodes,
        RendezvousTimeout(
            join=seconds("join_timeout", JOIN_SECONDS),
            last_call=seconds("last_call_timeout", 30),
            close=seconds("close_timeout", 30),
            heartbeat=seconds("heartbeat_timeout", 5),
        ),
        keep_alive_interval=seconds("keep_alive_interval", KEEP_ALIVE_SECONDS),
        keep_alive_max_attempt=_number(
            parameters, "keep_alive_max_attempt", KEEP_ALIVE_ATTEMPTS
        ),
    )
    return Rendezvous(settings, backend, store, parameters.local_addr, where)


def _seconds(parameters: RendezvousParameters, name: str, default: float) -> timedelta:
    """Return a time of `--rdzv-conf`, or the default."""
    return timedelta(seconds=float(parameters.get(name, default)))


def _number(parameters: RendezvousParameters, name: str, default: int) -> int:
    """Return a value of `--rdzv-conf`, or torchrun's default."""
    return parameters.get_as_int(name, default) or default


def _in_etcd(
    host: str, port: int, parameters: RendezvousParameters
) -> tuple[RendezvousBackend, Store]:
    seconds = _number(parameters, "read_timeout", READ_SECONDS)
    try:
        return etcd.connect(host, port, parameters.run_id, seconds)
    except etcd.NoEtcdError as error:
        refuse(f"The machines meet in etcd. {error}")


def _served(
    host: str, port: int, parameters: RendezvousParameters
) -> tuple[RendezvousBackend, Store]:
    store = _store(host, port, parameters)
    return C10dRendezvousBackend(store, parameters.run_id), store


def _store(host: str, port: int, parameters: RendezvousParameters) -> TCPStore:
    """Serve the store if this is its machine and it is not served yet; else connect."""
    if host in EVERYWHERE:
        refuse(
            f"The endpoint is an address of one machine, not {host}: the store would "
            "listen on all of them."
        )
    seconds = _number(parameters, "read_timeout", READ_SECONDS)
    try:
        served = tcp_store.serve_here(host, port, seconds)
        if served is None:
            _await_endpoint(
                host, port, _number(parameters, "join_timeout", JOIN_SECONDS)
            )
            served = tcp_store.connect_to_store(host, port, seconds)
        return served
    except tcp_store.NoStoreError:
        refuse(
            "The machines meet in a store at the endpoint, and another program "
            f"answers at {host}:{port}. Choose a free port."
        )
    except (OSError, OverflowError) as error:
        refuse(
            f"The machines meet in a store at the endpoint, and {host}:{port} cannot "
            f"be used: {error}. Use the address of one of them and a port from 1 to "
            "65535."
        )


def _await_endpoint(host: str, port: int, seconds: float) -> None:
    begin = time.monotonic()
    next_note = begin + FIRST_SECONDS
    while not tcp_store.is_there(host, port):
        now = time.monotonic()
        if now > begin + seconds:
            refuse(
                f"The machine of the endpoint must answer within {seconds:.0f} s, and "
                f"nothing answers at {host}:{port}. Run the same command there, too; "
                "`samestep doctor --peer HOST` shows whether it can be reached."
            )
        if now > next_note:
            next_note = now + AGAIN_SECONDS
            say(f"waiting for the machine of the endpoint, {host}:{port}")
        time.sleep(LOOK_SECONDS)


def _check_job(store: Store, run_id: str, where: str) -> None:
    """Refuse another recipe: all machines would stop, also those that train."""
    own = os.environ.get(JOB, "")
    if not own:
        return
    key = f"samestep/job/{run_id}"
    if store.add(f"{key}/machines", 1) == 1:
        store.set(key, own)
    first = store.get(key).decode()
    if first != own:
        there, here = json.loads(first), json.loads(own)
        differing = [
            f"{name}: {there.get(name)} there and {here.get(name)} here"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        refuse(
            f"All machines of a job train one recipe, and that of {where}, "
            f"differs in {'; '.join(differing)}. Run the same command, or use another "
            "port or `--rdzv-id` for another job."
        )
