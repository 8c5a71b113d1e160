"""The model together with its loss: what a micro-batch goes through."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.recipe import LossRecipe


class Objective(nn.Module):
    """Classification by cross-entropy, summed over samples."""

    def __init__(self, model: nn.Module, loss: LossRecipe) -> None:
        super().__init__()
        self.model = model
        self._label_smoothing = loss.label_smoothing

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [b, ...] and int64 targets [b] -> summed loss [], correct answers [].

        A micro-batch of no samples has loss 0 and gradient 0 for every parameter, so
        that its owner takes part in the exchange like everyone else.
        """
        if len(targets) == 0:
            nothing = torch.stack([(p * 0).sum() for p in self.model.parameters()])
            return nothing.sum(), torch.zeros((), dtype=torch.int64)
        logits = self.model(inputs)
        loss = functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=self._label_smoothing
        )
        return loss, (logits.detach().argmax(dim=1) == targets).sum()
