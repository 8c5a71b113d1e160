"""Early stopping: a pure decision from exact numbers, so all workers decide alike."""

from dataclasses import dataclass, field

from samestep.config.training import EarlyStoppingRecipe


@dataclass
class Stopping:
    """What an early end depends on; part of the progress."""

    best: float | None = None
    """The best value so far."""
    best_epoch: int = 0
    """Its epoch, counted from 1; 0 before there is one."""
    waited: int = 0
    """Epochs since then."""
    counts: list[int] = field(default_factory=list)
    """The integer buffers that belong to the best weights, if these are kept."""

    def note(self, recipe: EarlyStoppingRecipe, value: float, epoch: int) -> bool:
        """One more epoch, counted from 1; returns whether it is the best so far."""
        if self.best is None or _improves(recipe, value, self.best):
            self.best, self.best_epoch, self.waited = value, epoch, 0
            return True
        self.waited += 1
        return False

    def is_over(self, recipe: EarlyStoppingRecipe | None) -> bool:
        """Whether the patience is exhausted."""
        return recipe is not None and self.waited >= recipe.patience


def _improves(recipe: EarlyStoppingRecipe, value: float, best: float) -> bool:
    if recipe.metric == "validation_accuracy":
        value, best = -value, -best
    return value < best - recipe.min_delta
