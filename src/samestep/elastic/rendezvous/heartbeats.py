"""The state that the agents share, without machines that have fallen silent."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousBackend,
    RendezvousSettings,
    _Action,
    _BackendRendezvousStateHolder,
    _DistributedRendezvousOpExecutor,
    _remove_participant_epilogue,
    _RendezvousContext,
)


LOOK_SECONDS = 0.1
"""Seconds between two looks at the state while machines meet."""


class LivingState(_BackendRendezvousStateHolder):
    """torchrun's state, with another rule for who is lost.

    torch compares the time of another machine's last heartbeat with the clock of this
    one. Here a heartbeat must change within some seconds of this machine's clock: so
    the seconds may be few though the clocks of two machines differ. And once all
    that are left of the last round have joined, the next is complete: torch would wait
    for others until the last call is over.
    """

    def __init__(
        self, backend: RendezvousBackend, settings: RendezvousSettings
    ) -> None:
        """Share it through the backend."""
        super().__init__(backend, settings, cache_duration=0)
        self._heard: dict[Any, tuple[Any, float]] = {}
        """Each machine's last heartbeat, and when it was first seen here."""
        self._expected: set[Any] = set()
        """Who takes part in the next round, unless it is lost before."""

    def expect_members(self) -> None:
        """Expect the machines of this round, and no others, in the next."""
        self._expected = set(self._state.participants)

    def _sanitize(self) -> None:
        """Do without the machines that are lost; called at each look at the state."""
        self._remove_silent()
        state = self._state
        if state.complete:
            # A machine that came later was in no round, but sees who is in this one.
            members = state.participants.keys() | state.wait_list
            self._expected |= members | state.redundancy_list
        elif state.deadline and self._expected and self._all_joined():
            state.deadline = datetime.now(UTC) - self._settings.timeout.last_call

    def _all_joined(self) -> bool:
        return self._expected <= self._state.participants.keys()

    def _remove_silent(self) -> None:
        state, settings, now = self._state, self._settings, time.monotonic()
        self._heard = {
            node: heard
            if (heard := self._heard.get(node)) and heard[0] == beat
            else (beat, now)
            for node, beat in state.last_heartbeats.items()
        }
        patience = settings.keep_alive_interval * settings.keep_alive_max_attempt
        for node, (_, since) in self._heard.items():
            if now - since > patience.total_seconds():
                del state.last_heartbeats[node]
                self._expected.discard(node)
                state.wait_list.discard(node)
                state.redundancy_list.discard(node)
                if state.participants.pop(node, None) is not None:
                    _remove_participant_epilogue(state, settings)

    def reopen(self) -> bool:
        """Begin another round after an earlier job, which closed it and is gone.

        Return False if some of its machines are alive. Only a store that outlives the
        machines can have such a state.
        """
        self._last_sync_time = -1.0
        self.sync()
        if self._state.last_heartbeats:
            return False
        self._state.closed = self._state.complete = False
        self._state.round += 1
        self.mark_dirty()
        self.sync()
        return True


class PromptExecutor(_DistributedRendezvousOpExecutor):
    """torchrun's loop over the steps of a meeting, which looks again sooner.

    torchrun waits a second whenever the others have to act first, and two machines that
    meet again wait for each other twice.
    """

    def run(
        self,
        state_handler: Callable[[_RendezvousContext, float], _Action],
        deadline: float,
        update_deadline: Callable[[timedelta], float] | None = None,
    ) -> None:
        """Take the steps that `state_handler` names, until it is finished."""

        def until_there_is_one(context: _RendezvousContext, deadline: float) -> _Action:
            while (action := state_handler(context, deadline)) == _Action.SYNC:
                time.sleep(LOOK_SECONDS)
                self._state_holder.sync()
                self._state = self._state_holder.state
                context = _RendezvousContext(self._node, self._state, self._settings)
            return action

        super().run(until_there_is_one, deadline, update_deadline)
