"""How the fresh workers of one generation find each other in a store of old keys.

torchrun gives no number that all workers of a generation share and no earlier one had:
TORCHELASTIC_RESTART_COUNT belongs to each agent, a change of members does not raise it,
and the agents' store keeps what earlier workers wrote. So they agree on a name:

    worker r    writes a fresh nonce under nonce/r
    rank 0      publishes the list of all nonces, the roster, again whenever one changes
    worker r    acknowledges every roster that has its own nonce
    rank 0      says go when all have acknowledged the roster that is published

A nonce of an earlier worker is never acknowledged; the worker that has this rank now
overwrites it. The name is the hash of the roster, so no earlier generation had it.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch._C._distributed_c10d import Store

from samestep.errors import PeerLost


ROOT = "samestep"
POLL_SECONDS = 0.02
START_SECONDS = 120.0
"""Deadline for all workers of a generation to arrive."""


@dataclass
class Roster:
    """One worker's part in the agreement."""

    store: Store
    rank: int
    workers: int
    pause: Callable[[], None] = lambda: time.sleep(POLL_SECONDS)
    """Called between two polls; may raise, for example when this worker is to stop."""
    seconds: float = START_SECONDS
    _nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    _acknowledged: str = ""

    def agree(self) -> str:
        """All workers: return the prefix of the generation's keys. Raises PeerLost."""
        wait(self.look, self.pause, self._missing, self.seconds)
        return self.name

    @property
    def name(self) -> str:
        """The generation's name, valid once `look` has returned True."""
        return f"{ROOT}/{self._acknowledged}"

    def look(self) -> bool:
        """Poll the store once and answer; return whether all workers agree."""
        self._claim()
        if self.rank == 0:
            self._publish()
        return self._is_go()

    def _claim(self) -> None:
        """Write the nonce, again if a late earlier worker of this rank overwrote it."""
        if self._read(f"nonce/{self.rank}") != self._nonce:
            self.store.set(f"{ROOT}/nonce/{self.rank}", self._nonce)

    def _publish(self) -> None:
        """Rank 0: publish the roster if it is complete and has changed."""
        nonces = [self._read(f"nonce/{rank}") for rank in range(self.workers)]
        roster = json.dumps(nonces)
        if None not in nonces and roster != self._read("roster"):
            self.store.set(f"{ROOT}/roster", roster)

    def _is_go(self) -> bool:
        """Acknowledge the roster; return whether rank 0 has said go."""
        roster = self._read("roster")
        nonces = json.loads(roster) if roster else []
        if len(nonces) != self.workers or nonces[self.rank] != self._nonce:
            return False
        name = hashlib.sha256(json.dumps(nonces).encode()).hexdigest()[:16]
        if name != self._acknowledged:
            self.store.set(f"{ROOT}/{name}/here/{self.rank}", "")
            self._acknowledged = name
        ranks = range(self.workers)
        if self.rank == 0 and all(self._has(f"{name}/here/{r}") for r in ranks):
            self.store.set(f"{ROOT}/{name}/go", "")
        return self._has(f"{name}/go")

    def _missing(self) -> str:
        ranks = [r for r in range(self.workers) if not self._has(f"nonce/{r}")]
        return f"worker {', '.join(map(str, ranks))}" if ranks else "an acknowledgement"

    def _has(self, key: str) -> bool:
        return self.store.check([f"{ROOT}/{key}"])

    def _read(self, key: str) -> str | None:
        return self.store.get(f"{ROOT}/{key}").decode() if self._has(key) else None


def wait(
    is_there: Callable[[], bool],
    pause: Callable[[], None],
    missing: Callable[[], str],
    seconds: float,
) -> None:
    """Poll until `is_there` returns True; after `seconds` raise PeerLost."""
    end = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > end:
            raise PeerLost(
                f"All workers must arrive and answer within {seconds:.0f} s; missing: "
                f"{missing()}. Check that all machines are up and can reach each other."
            )
        pause()
