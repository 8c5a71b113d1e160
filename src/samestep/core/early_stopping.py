"""Early stopping: a pure decision from exact numbers, so all workers agree."""

from dataclasses import dataclass, field

from samestep.config.training import EarlyStoppingRecipe


@dataclass
class Stopping:
    """The state of early stopping; part of the progress and of every snapshot."""

    best: float | None = None
    """The best value so far."""
    best_epoch: int = 0
    """The epoch of the best value, counted from 1; 0 before there is one."""
    waited: int = 0
    """Epochs since the best one."""
    counts: list[int] = field(default_factory=list)
    """The integer buffers of the best weights, if these are kept."""

    def observe(self, recipe: EarlyStoppingRecipe, value: float, epoch: int) -> bool:
        """Take the value of an epoch, counted from 1; return whether it is the best."""
        sign = -1 if recipe.metric == "validation_accuracy" else 1
        if self.best is None or sign * value < sign * self.best - recipe.min_delta:
            self.best, self.best_epoch, self.waited = value, epoch, 0
            return True
        self.waited += 1
        return False

    def is_over(self, recipe: EarlyStoppingRecipe | None) -> bool:
        """Return whether the patience is exhausted; without a recipe it never is."""
        return recipe is not None and self.waited >= recipe.patience
