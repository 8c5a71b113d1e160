"""Sums of tensors in the order of the canonical tree.

Apart from `core.tree`, which processes without torch import, too.
"""

import torch
from torch import Tensor

from samestep.core import tree


def tree_sum(cells: Tensor) -> Tensor:
    """Sum cells [..., M] over M in the order of the canonical tree: [...]."""
    num_leaves = cells.shape[-1]
    leaves = {(m, m + 1): cells[..., m] for m in range(num_leaves)}
    return tree.reduce(num_leaves, leaves, torch.add)
