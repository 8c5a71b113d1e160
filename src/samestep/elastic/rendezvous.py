"""A rendezvous of torchrun whose store listens on one address only.

torchrun's own backend, c10d, lets its store listen on all addresses of the machine; who
reaches it can run code there. `--rdzv-backend samestep` is the same rendezvous over a
store that listens where the others look for it, at the endpoint, and nowhere else.

It also makes rank 0 serve the store of the workers (`samestep.elastic`), likewise:
torchrun's would listen everywhere, and after the machine that serves it has left, some
agents still look for it there.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    DEFAULT_PORT,
    C10dRendezvousBackend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from samestep.elastic import tcp_store
from samestep.elastic.nodes import JOB, REFUSED
from samestep.system.log import logger, shown_on_stderr


EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  refused
NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
READ_SECONDS = 60
"""Deadline for an answer of the store, unless `--rdzv-conf read_timeout=...`."""
JOIN_SECONDS = 600
"""Deadline for all machines to be there, unless `--rdzv-conf join_timeout=...`."""
FIRST_SECONDS, AGAIN_SECONDS = 3.0, 30.0
"""When to say for whom this machine waits."""
LOOK_SECONDS = 0.5


class Backend(C10dRendezvousBackend):
    """Under a name of its own, which torchrun compares with the one asked for."""

    @property
    def name(self) -> str:
        """What `--rdzv-backend` says."""
        return "samestep"


class Rendezvous(DynamicRendezvousHandler):
    """torchrun's, which says for whom it waits, and ends in one sentence."""

    where: str = ""
    """What meets where, in words."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Returns when all machines are there."""
        try:
            with self._announced():
                return super().next_rendezvous()
        except RendezvousTimeoutError:
            refuse(
                "All machines must meet in time, and fewer than "
                f"{self._settings.min_nodes} have come, {self.where}. Give the same "
                "command on all of them; `samestep doctor --peer HOST` tells whether "
                "they reach each other."
            )

    @contextmanager
    def _announced(self) -> Iterator[None]:
        met = threading.Event()

        def announce() -> None:
            seconds = FIRST_SECONDS
            while not met.wait(seconds):
                seconds = AGAIN_SECONDS
                here = len(self._state_holder.state.participants)
                least = self._settings.min_nodes
                if 0 < here < least:
                    say(f"waiting for {least - here} of {least} machines, {self.where}")

        thread = threading.Thread(target=announce, name="announcer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            met.set()
            thread.join()


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun calls to learn how `--rdzv-backend samestep` is made."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """One agent's part; ends the process if the endpoint cannot be one."""
    os.environ[NO_SHARED_STORE] = "1"
    host, port = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
    served = _store(host, port, parameters)
    where = f"job {parameters.run_id}, at {host}:{port}"
    _check_job(served, parameters.run_id, where)
    made: Rendezvous = Rendezvous.from_backend(
        parameters.run_id,
        served,
        Backend(served, parameters.run_id),
        parameters.min_nodes,
        parameters.max_nodes,
        parameters.local_addr,
        RendezvousTimeout(
            join=timedelta(seconds=_number(parameters, "join_timeout", JOIN_SECONDS)),
            last_call=timedelta(seconds=_number(parameters, "last_call_timeout", 30)),
            close=timedelta(seconds=_number(parameters, "close_timeout", 30)),
            heartbeat=timedelta(seconds=_number(parameters, "heartbeat_timeout", 5)),
        ),
        keep_alive_interval=_number(parameters, "keep_alive_interval", 5),
        keep_alive_max_attempt=_number(parameters, "keep_alive_max_attempt", 3),
    )
    made.where = where
    return made


def _number(parameters: RendezvousParameters, name: str, default: int) -> int:
    """Of `--rdzv-conf`; the defaults are torchrun's."""
    return parameters.get_as_int(name, default) or default


def _store(host: str, port: int, parameters: RendezvousParameters) -> TCPStore:
    """Served here if this is the place and nobody does yet."""
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
            "The machines meet in a store at the endpoint, and what answers at "
            f"{host}:{port} is another program. Choose a free port."
        )
    except (OSError, OverflowError) as error:
        refuse(
            f"The machines meet in a store at the endpoint, and {host}:{port} cannot "
            f"be one: {error}. Use the address of one of them and a port from 1 to "
            "65535."
        )


def _await_endpoint(host: str, port: int, seconds: float) -> None:
    begin = time.monotonic()
    told = begin + FIRST_SECONDS
    while not tcp_store.is_there(host, port):
        now = time.monotonic()
        if now > begin + seconds:
            refuse(
                f"The machine of the endpoint must be there within {seconds:.0f} s, "
                f"and nothing answers at {host}:{port}. Give the same command there, "
                "too; `samestep doctor --peer HOST` tells whether it is reached."
            )
        if now > told:
            told = now + AGAIN_SECONDS
            say(f"waiting for the machine of the endpoint, {host}:{port}")
        time.sleep(LOOK_SECONDS)


def _check_job(served: TCPStore, run_id: str, where: str) -> None:
    """Other recipes must not join: all machines would end, also those that train."""
    own = os.environ.get(JOB, "")
    if not own:
        return
    found = served.compare_set(f"samestep/job/{run_id}", "", own).decode()
    if found != own:
        there, here = json.loads(found), json.loads(own)
        differing = [
            f"{name}: {there.get(name)} there and {here.get(name)} here"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        refuse(
            f"All machines of a job train one recipe, and that of {where}, "
            f"differs in {'; '.join(differing)}. Give the same command, or another "
            "port or `--rdzv-id` to another job."
        )


def say(text: str) -> None:
    """Log a notice of the torchrun agent, on stderr unless logging is configured."""
    with shown_on_stderr():
        logger.info(text)


def refuse(text: str) -> NoReturn:
    """Ends torchrun with one sentence, which `samestep train --nodes` shows, if any."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": text, "errorCode": REFUSED}
        Path(file).write_text(json.dumps({"message": message}))
    else:
        say(f"Error: {text}")
    sys.exit(2)
