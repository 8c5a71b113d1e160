"""What the supervisor tells its workers to do."""

from dataclasses import asdict
from typing import Any

from samestep.config.placement import Placement
from samestep.system import fault_injection
from samestep.system.machine import usable_cores
from samestep.user_code import imports


SPIN_SECONDS = 2e-3
"""How long at most a worker with a core of its own tries before it sleeps: most waits
end sooner, and to be woken takes 30 to 60 us."""
CROWDED_SPIN_SECONDS = 50e-6
"""The same where workers share cores: the awaited worker may need this one."""
PEER_SLACK = 10
"""The supervisor names a worker that hangs; a peer gives up only so many times later,
in case the supervisor hangs too."""


def exchange_fields(placement: Placement) -> dict[str, Any]:
    """What a worker needs to join the exchange, and to be watched."""
    crowded = placement.num_workers > usable_cores()[0]
    return {
        "device": placement.device,
        "exchange": placement.exchange,
        "places": imports.search_path(),
        "hang_timeout": placement.hang_timeout,
        "start_timeout": placement.start_timeout,
        "peer_timeout": PEER_SLACK * placement.hang_timeout,
        "spin_seconds": CROWDED_SPIN_SECONDS if crowded else SPIN_SECONDS,
        "balance": placement.balance,
        "drop_stragglers_below": placement.drop_stragglers_below,
        "snapshot_seconds": placement.snapshot_seconds,
        "prefetch": placement.prefetch == "auto",
        "probe": placement.probe,
        "profile": placement.profile,
        "faults": [asdict(fault) for fault in fault_injection.from_environment()],
    }
