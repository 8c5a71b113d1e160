"""The canonical tree: in which order the values of the micro-batches are summed.

Floating-point addition is not associative, so a sum has one result only when its
order is fixed. Here it is a binary tree over the leaves `0..n-1`: a range of more than
one leaf splits at the largest power of two below its length. Whichever worker computes
which leaves, the same additions happen in the same order.

    n = 7:  [0,7) = [0,4) + [4,7),   [0,4) = [0,2) + [2,4),   [4,7) = [4,6) + [6,7)
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:  # processes without torch import this module, too
    from torch import Tensor


T = TypeVar("T")
Range = tuple[int, int]
"""A node of the tree: the range `[first, end)` of leaves below it."""


def split(node: Range) -> int:
    """Return the leaf at which a node of more than one leaf divides."""
    first, end = node
    return first + (1 << ((end - first - 1).bit_length() - 1))


def subtrees(owned: Range, num_leaves: int) -> list[Range]:
    """Return the maximal nodes inside `owned`, left to right.

    These are the partial sums that the owner of the leaves contributes.
    """

    def descend(node: Range) -> list[Range]:
        first, end = node
        if first >= owned[1] or end <= owned[0]:
            return []
        if owned[0] <= first and end <= owned[1]:
            return [node]
        middle = split(node)
        return descend((first, middle)) + descend((middle, end))

    return descend((0, num_leaves)) if owned[0] < owned[1] else []


def num_merges(leaf: int, owned: Range, num_leaves: int) -> int:
    """Return how many sums are complete once `leaf`, in order, has arrived.

    An owner keeps a stack: it pushes each leaf's value, then this many times replaces
    the top two by their sum. At the end the stack holds the values of
    `subtrees(owned, num_leaves)`.
    """
    below = next(node for node in subtrees(owned, num_leaves) if leaf < node[1])
    merges = 0
    while below[1] - below[0] > 1:
        merges = merges + 1 if below[1] == leaf + 1 else 0
        middle = split(below)
        below = (below[0], middle) if leaf < middle else (middle, below[1])
    return merges


def deepest_stack(num_leaves: int) -> int:
    """Return the most values that an owner of any range has on its stack at once."""
    siblings = set(_siblings((0, num_leaves)))
    deepest = 0
    for first in range(num_leaves):
        stack: list[Range] = []
        for leaf in range(first, num_leaves):
            stack.append((leaf, leaf + 1))
            while len(stack) > 1 and (*stack[-2], stack[-1][1]) in siblings:
                _, end = stack.pop()
                stack[-1] = stack[-1][0], end
            deepest = max(deepest, len(stack))
    return deepest


def _siblings(node: Range) -> Iterator[tuple[int, int, int]]:
    """Yield (first, middle, end) of every node that has children."""
    if node[1] - node[0] > 1:
        middle = split(node)
        yield node[0], middle, node[1]
        yield from _siblings((node[0], middle))
        yield from _siblings((middle, node[1]))


def reduce(num_leaves: int, parts: Mapping[Range, T], add: Callable[[T, T], T]) -> T:
    """Return the value of the root, from `parts`, nodes that cover all leaves.

    `add(left, right)` may write its result into `left`.
    """

    def value(node: Range) -> T:
        if node in parts:
            return parts[node]
        middle = split(node)
        return add(value((node[0], middle)), value((middle, node[1])))

    return value((0, num_leaves))


def tree_sum(cells: "Tensor") -> "Tensor":
    """Sum cells [..., M] over M in the order of the canonical tree: [...]."""
    num_leaves = cells.shape[-1]
    leaves = {(m, m + 1): cells[..., m] for m in range(num_leaves)}
    return reduce(num_leaves, leaves, operator.add)
