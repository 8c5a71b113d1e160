"""The vectors of a model in a user's own loop, whose passes are unknown."""

import torch
from torch import Tensor, nn

from samestep.state.flat import Flat


class LoopFlat(Flat):
    """Vectors whose tail says which buffers the passes have changed.

    In a training, a dry run finds the buffers that passes change. In a loop these may
    differ from pass to pass: BatchNorm may be in evaluation mode, a branch not taken.
    So each micro-batch also adds which elements it changed, and by how much it counted:

        tail  [ buffers | changed, 0 or 1 | counts | is weighed | has changed ]

    All workers must know of how many the last two are true; added up here, they take no
    exchange of their own.
    """

    counters_may_rest = True
    is_weighed = False
    """Whether `Loop.weigh` was called in the current micro-batch."""
    has_changed = False
    """Whether gradients of the current micro-batch changed after they were sent."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.tail = 2 * self.layout.tail + len(self.counts) + 2

    def read_tail(self) -> Tensor:
        """Return what a micro-batch adds besides its gradient, [tail]."""
        marks = [self.is_weighed, self.has_changed]
        if not self.moving:
            return torch.tensor(marks, dtype=self.dtype)
        counted = [
            int(counter) - count
            for counter, count in zip(self._counters, self.counts, strict=True)
        ]
        counts = torch.tensor([*counted, *marks], dtype=self.dtype)
        if not self._buffers:
            return counts
        now = self.read_buffers()
        changed = (now != self.saved_buffers()).to(self.dtype)
        return torch.cat([now, changed, counts])

    @staticmethod
    def num_weighed(total: Tensor) -> int:
        """Return how many micro-batches were weighed, from the sum of the tails."""
        return int(total[-2])

    @staticmethod
    def have_changed(total: Tensor) -> bool:
        """Return whether gradients of any worker changed after they were sent."""
        return bool(total[-1])

    def keep_buffers(self) -> None:
        """Take the buffers as they are now for those between two steps."""
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            saved.copy_(buffer)
        self.counts = [int(counter) for counter in self._counters]

    def advance(self, total: Tensor, micro_batches: int) -> None:
        """Set the buffers from the sum of the tails [tail], after a step.

        Elements that no pass has changed stay as they are: their mean might be rounded.
        """
        if not self.moving:
            return
        size = self.layout.tail
        sums, changed, counted = total[:size], total[size : 2 * size], total[2 * size :]
        values = torch.where(changed > 0, sums / micro_batches, self.saved_buffers())
        more = zip(self.counts, counted[:-2].tolist(), strict=True)
        self.set_buffers(values, [count + int(added) for count, added in more])
