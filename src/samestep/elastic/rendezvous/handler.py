"""torchrun's rendezvous, with what samestep adds."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousSettings,
)

from samestep.elastic import watchdog
from samestep.elastic.rendezvous.heartbeats import LivingState, PromptExecutor
from samestep.elastic.rendezvous.notices import (
    AGAIN_SECONDS,
    FIRST_SECONDS,
    refuse,
    say,
)
from samestep.errors import WorkerWrong


class Rendezvous(DynamicRendezvousHandler):
    """torchrun's, with notes while it waits and a one-sentence error.

    A machine that falls silent is lost after seconds, and its loss is not a failure of
    the others: torchrun restarts their workers as it does when a machine joins.
    """

    def __init__(
        self,
        settings: RendezvousSettings,
        backend: RendezvousBackend,
        store: Store,
        local_addr: str | None,
        where: str,
    ) -> None:
        """Join as one agent. `where` has the job and its endpoint, for messages."""
        self._living = LivingState(backend, settings)
        node = self._node_desc_generator.generate(local_addr)
        # torchrun wants the name that it was asked for.
        super().__init__(node, settings, "samestep", store, self._living)
        self._op_executor = PromptExecutor(node, self._living, settings)
        self._where = where
        self._machines = 0
        """In the current round."""

    def num_nodes_waiting(self) -> int:
        """Return how many machines have to be joined, or done without.

        If there are any, torchrun restarts the workers, and counts no failure.
        """
        waiting = super().num_nodes_waiting()
        lost = self._machines - len(self._living.state.participants)
        if lost:
            say(f"lost {lost} of {self._machines} machines, {self._where}")
            watchdog.announce_loss()
        if waiting + lost:
            watchdog.wake_workers(os.getpid())
        return waiting + lost

    def next_rendezvous(self) -> RendezvousInfo:
        """Return when all machines have arrived."""
        try:
            with self._announced():
                joined = self._join()
        except RendezvousTimeoutError:
            refuse(
                f"Fewer than {self._settings.min_nodes} machines have arrived in time, "
                f"{self._where}. Run the same command on all of them; `samestep doctor "
                "--peer HOST` shows whether they can reach each other."
            )
        self._machines = joined.world_size
        self._living.expect_members()
        watchdog.expect_no_loss()
        return joined

    def shutdown(self) -> bool:
        """End the job on all machines.

        This one only leaves if its workers were wrong too often and the others are
        enough: they go on without it, as after its loss.
        """
        others = len(self._living.state.participants) - 1
        if others >= self._settings.min_nodes and _is_wrong(sys.exception()):
            self._stop_heartbeats()
            return True
        return super().shutdown()

    def _join(self) -> RendezvousInfo:
        try:
            return super().next_rendezvous()
        except RendezvousClosedError:
            if self._machines:
                raise
        # Long enough to notice that no machine of the earlier job is alive.
        interval, attempts = self._settings.keep_alive_interval, 1
        attempts += self._settings.keep_alive_max_attempt
        time.sleep(attempts * interval.total_seconds())
        if not self._living.reopen():
            refuse(
                f"The training is over, or about to be: {self._where}. For another one "
                "choose another `--rdzv-id`."
            )
        return super().next_rendezvous()

    @contextmanager
    def _announced(self) -> Iterator[None]:
        met = threading.Event()

        def announce() -> None:
            seconds = FIRST_SECONDS
            while not met.wait(seconds):
                seconds = AGAIN_SECONDS
                here = len(self._living.state.participants)
                least = self._settings.min_nodes
                if 0 < here < least:
                    say(
                        f"waiting for {least - here} of {least} machines, {self._where}"
                    )

        thread = threading.Thread(target=announce, name="announcer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            met.set()
            thread.join()


def _is_wrong(ended: BaseException | None) -> bool:
    """Return whether the error with which torchrun ends is that of a wrong worker."""
    return isinstance(ended, ChildFailedError) and any(
        isinstance(failure.message, dict)
        and failure.message["message"].startswith(WorkerWrong.__name__)
        for failure in ended.failures.values()
    )
