"""Makes the part of a job that comes from the recipe and the placement."""

from collections.abc import Sequence

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.messages.job import Setup
from samestep.system import barrier, fault_injection
from samestep.user_code import imports
from samestep.user_code.references import NOTHING, Given


PEER_SLACK = 10
"""A worker waits this many times longer for its peers than the supervisor does for a
sign of progress. So the supervisor names the one that hangs, unless it hangs itself."""


def make_setup(
    recipe: Recipe,
    placement: Placement,
    objects: Given = NOTHING,
    callbacks: Sequence[str] = (),
) -> Setup:
    """Return the part of a job that does not depend on its kind."""
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
        spin_seconds=barrier.spin_seconds(placement.num_workers),
        snapshot_seconds=placement.snapshot_seconds,
        checkpoint_steps=placement.checkpoint_steps,
        balance=balance if isinstance(balance, str) else list(balance),
        drop_stragglers_below=placement.drop_stragglers_below,
        prefetch=placement.prefetch == "auto",
        probe=placement.probe,
        verify=placement.verify,
        ledger=placement.ledger,
        profile=placement.profile,
        keep_checkpoints=placement.keep_checkpoints,
        faults=fault_injection.from_environment(),
        callbacks=list(callbacks),
    )
