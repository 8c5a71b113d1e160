"""Who computes which micro-batches: pure functions, the same on every worker.

A worker of speed v (micro-batches per second) that owns n of them needs n / v seconds;
a step takes as long as its slowest worker, the makespan max(n_r / v_r). Ownership is
contiguous, so a worker's partial sums are few (`core.tree`). None of this changes
a bit: sums are taken in the order of the tree, whichever worker computes its leaves.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from samestep.core import tree


Share = tuple[int, int]
"""The micro-batches `[first, end)` of one worker; it may have none."""


def pieces(length: int, count: int) -> list[int]:
    """Return the `count + 1` cuts of `length` items into pieces of even size.

    Sizes differ by at most one; some are zero if there are fewer items than pieces.
    """
    return [index * length // count for index in range(count + 1)]


def spaced(steps: int, number: int) -> frozenset[int]:
    """Return `number` evenly spaced steps of 1 to `steps`, which is the last of them.

    Fewer if there are not as many.
    """
    return frozenset(pieces(steps, number)) - {0} if number else frozenset()


def shares(micro_batches: int, workers: int) -> list[Share]:
    """Return even contiguous ownership: the micro-batches of each worker."""
    return list(pairwise(pieces(micro_batches, workers)))


def contiguous(counts: Sequence[int]) -> list[Share]:
    """Return ranges of these lengths, from left to right."""
    return list(pairwise(accumulate(counts, initial=0)))


def lengths(owned: Sequence[Share]) -> list[int]:
    """Return how many micro-batches each worker owns; the inverse of `contiguous`."""
    return [end - first for first, end in owned]


def makespan(owned: Sequence[Share], speeds: Sequence[float]) -> float:
    """Return the seconds of the slowest worker.

    Infinite if a worker without speed owns something.
    """
    return max(
        ((end - first) / speed if speed > 0 else float("inf"))
        for (first, end), speed in zip(owned, speeds, strict=True)
        if end > first
    )


def fastest(
    micro_batches: int, speeds: Sequence[float], least_owned: int = 0
) -> list[Share]:
    """Return the ownership with the least makespan; among equals, the fewest partials.

    Each worker has at least `least_owned` micro-batches. Giving each of the others to
    the worker with the smallest (n + 1) / v is optimal: no makespan below the last of
    these values leaves room for all of them.
    """
    counts = [least_owned] * len(speeds)
    for _ in range(micro_batches - sum(counts)):
        times = [
            (n + 1) / v if v > 0 else float("inf")
            for n, v in zip(counts, speeds, strict=True)
        ]
        counts[times.index(min(times))] += 1
    # How many micro-batches each worker computes within the least makespan; the factor
    # allows for rounding, or an exact fit could be cut off.
    # Who has no more than the least may be late; that leaves no room to the others.
    given = [n if n > least_owned else 0 for n in counts]
    if not any(given):
        return contiguous(counts)
    least = makespan(contiguous(given), speeds)
    caps = [max(least_owned, int(least * v * (1 + 1e-12))) for v in speeds]
    return contiguous(_fewest_partials(micro_batches, caps, least_owned))


def _fewest_partials(
    micro_batches: int, caps: Sequence[int], least_owned: int
) -> list[int]:
    """Return counts up to `caps`, with the fewest maximal subtrees.

    The sum of `caps` is only a little more than `micro_batches`, so few counts are
    possible for each worker. Dynamic programming from left to right: `best` maps where
    the next share begins to (partials so far, counts so far).
    """
    slack = sum(caps) - micro_batches
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for index, cap in enumerate(caps):
        left = sum(caps[index + 1 :])
        following: dict[int, tuple[int, list[int]]] = {}
        for first, (partials, counts) in best.items():
            for count in range(cap, max(least_owned, cap - slack) - 1, -1):
                end = first + count
                if end > micro_batches or end + left < micro_batches:
                    continue
                cost = partials + len(tree.subtrees((first, end), micro_batches))
                if end not in following or cost < following[end][0]:
                    following[end] = cost, [*counts, count]
        best = following
    return best[micro_batches][1]


def seconds_without(
    worker: int,
    micro_batches: int,
    speeds: Sequence[float],
    updates: Sequence[float],
) -> float:
    """Return the seconds of a step without one worker: compute, then update.

    Each worker updates its slice of the parameters in `updates[r]` seconds, and all
    wait for the last; with one worker less, the slices are larger.
    """
    others, slices = (
        [value for rank, value in enumerate(values) if rank != worker]
        for values in (speeds, updates)
    )
    computing = makespan(fastest(micro_batches, others), others)
    return computing + max(slices) * len(speeds) / len(others)


def efficiency(micro_batches: int, speeds: Sequence[float]) -> float:
    """Return how close whole micro-batches come to the sum of all speeds, 0 to 1."""
    ideal = micro_batches / sum(speeds)
    return ideal / makespan(fastest(micro_batches, speeds), speeds)


def enough_micro_batches(
    micro_batches: int, speeds: Sequence[float], wanted: float
) -> int:
    """Double `micro_batches` until the efficiency reaches `wanted`, or 1,024."""
    while efficiency(micro_batches, speeds) < wanted and micro_batches < 1024:
        micro_batches *= 2
    return micro_batches
