"""A rendezvous of torchrun whose store listens on one address only.

The store of torchrun's own backend, c10d, listens on all addresses of the machine, and
anybody who can connect to it can run code there. `--rdzv-backend samestep` is the same
rendezvous over a store that listens at the endpoint and nowhere else.

It also makes rank 0 serve the store of the workers, for the same reason; and after the
machine that serves torchrun's has left, some agents would still look for it there.
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
"""Deadline of the store's operations; `--rdzv-conf read_timeout=...` changes it."""
JOIN_SECONDS = 600
"""Deadline for all machines to arrive; `--rdzv-conf join_timeout=...` changes it."""
FIRST_SECONDS, AGAIN_SECONDS = 3.0, 30.0
"""Seconds until the first and between further notes on what this machine awaits."""
LOOK_SECONDS = 0.5


class Backend(C10dRendezvousBackend):
    """The c10d backend under the name that torchrun was asked for."""

    @property
    def name(self) -> str:
        """The value of `--rdzv-backend`."""
        return "samestep"


class Rendezvous(DynamicRendezvousHandler):
    """torchrun's rendezvous, with notes while it waits and a one-sentence error."""

    where: str = ""
    """The job and its endpoint, for messages."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Return when all machines have arrived."""
        try:
            with self._announced():
                return super().next_rendezvous()
        except RendezvousTimeoutError:
            refuse(
                f"Fewer than {self._settings.min_nodes} machines have arrived in time, "
                f"{self.where}. Run the same command on all of them; `samestep doctor "
                "--peer HOST` shows whether they can reach each other."
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
    """Return the factory of `--rdzv-backend samestep`; torchrun's entry point."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """Join the rendezvous as one agent; exit if the endpoint cannot be used."""
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
    """Return a value of `--rdzv-conf`, or torchrun's default."""
    return parameters.get_as_int(name, default) or default


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


def _check_job(served: TCPStore, run_id: str, where: str) -> None:
    """Refuse another recipe: all machines would stop, also those that train."""
    own = os.environ.get(JOB, "")
    if not own:
        return
    first = served.compare_set(f"samestep/job/{run_id}", "", own).decode()
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


def say(text: str) -> None:
    """Log a notice of the torchrun agent, on stderr unless logging is configured."""
    with shown_on_stderr():
        logger.info(text)


def refuse(text: str) -> NoReturn:
    """End torchrun with one sentence, which `samestep train --nodes` shows."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": text, "errorCode": REFUSED}
        Path(file).write_text(json.dumps({"message": message}))
    else:
        with shown_on_stderr():
            logger.error("Error: %s", text)
    sys.exit(2)
