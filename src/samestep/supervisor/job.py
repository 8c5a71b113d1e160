"""Makes the part of a job that comes from the recipe and the placement."""

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.messages.job import Setup
from samestep.system import fault_injection
from samestep.system.machine import usable_cores
from samestep.user_code import imports
from samestep.user_code.references import NOTHING, Given


SPIN_SECONDS = 2e-3
"""How long a worker with a core of its own spins before it sleeps, at most. Most waits
end sooner, and waking up takes 30 to 60 us."""
CROWDED_SPIN_SECONDS = 50e-6
"""The same where workers share cores: the awaited worker may need this one."""
PEER_SLACK = 10
"""A worker waits so many times longer for its peers than the supervisor does for a sign
of progress. So the supervisor names the one that hangs, unless it hangs itself."""


def make_setup(recipe: Recipe, placement: Placement, objects: Given = NOTHING) -> Setup:
    """Return the part of a job that does not depend on its kind."""
    is_crowded = placement.num_workers > usable_cores()[0]
    balance = placement.balance
    return Setup(
        recipe=recipe.to_dict(),
        device=placement.device,
        exchange=placement.exchange,
        search_path=imports.search_path(),
        objects=objects.extents,
        hang_timeout=placement.hang_timeout,
        start_timeout=placement.start_timeout,
        peer_timeout=PEER_SLACK * placement.hang_timeout,
        spin_seconds=CROWDED_SPIN_SECONDS if is_crowded else SPIN_SECONDS,
        snapshot_seconds=placement.snapshot_seconds,
        balance=balance if isinstance(balance, str) else list(balance),
        drop_stragglers_below=placement.drop_stragglers_below,
        prefetch=placement.prefetch == "auto",
        probe=placement.probe,
        profile=placement.profile,
        faults=fault_injection.from_environment(),
    )
