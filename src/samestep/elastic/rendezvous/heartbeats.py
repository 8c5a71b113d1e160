"""The state that the agents share, without machines that have fallen silent."""

import time
from typing import Any

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousBackend,
    RendezvousSettings,
    _BackendRendezvousStateHolder,
    _remove_participant_epilogue,
)


class LivingState(_BackendRendezvousStateHolder):
    """torchrun's state, with another rule for who is lost.

    torch compares the time of another machine's last heartbeat with the clock of this
    one. Here a heartbeat must change within some seconds of this machine's clock: so
    the seconds may be few though the clocks of two machines differ.
    """

    def __init__(
        self, backend: RendezvousBackend, settings: RendezvousSettings
    ) -> None:
        """Share it through the backend."""
        super().__init__(backend, settings)
        self._heard: dict[Any, tuple[Any, float]] = {}
        """Each machine's last heartbeat, and when it was first seen here."""

    def _sanitize(self) -> None:
        """Remove the machines that are lost; called at each look at the state."""
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
