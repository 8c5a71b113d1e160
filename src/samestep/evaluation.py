"""Evaluation: every sample exactly once, the same bits at any number of workers."""

import torch
from torch.nn import Module

from samestep.balance import shares
from samestep.board import Board
from samestep.dataset import Split
from samestep.exchange import Exchange
from samestep.metrics import Sums, tree_sum
from samestep.objective import Objective
from samestep.recipe import LossRecipe


@torch.inference_mode()
def evaluate(
    model: Module,
    split: Split,
    batch: int,
    rank: int,
    exchange: Exchange,
    board: Board,
) -> Sums:
    """All workers: loss (without label smoothing) and correct answers over a split.

    The split is cut into batches of `batch` samples, whose sums are added in the order
    of the canonical tree; a worker computes a contiguous share of the batches.
    """
    objective = Objective(model.eval(), LossRecipe())
    num_batches = -(-len(split) // batch)
    cells = torch.zeros(2, num_batches, dtype=torch.float64)
    for index in range(*shares(num_batches, exchange.workers)[rank]):
        board.beat()
        start = index * batch
        samples = torch.arange(start, min(start + batch, len(split)))
        cells[:, index] = torch.stack(
            [value.double() for value in objective(*split.gather(samples))]
        )
    board.reach()
    loss, correct = tree_sum(exchange.merge(cells)).tolist()
    model.train()
    return Sums(loss, int(correct), len(split))
