"""How work is divided among workers: pure functions, the same everywhere."""

from itertools import pairwise


def pieces(length: int, count: int) -> list[int]:
    """The `count + 1` cuts of `length` samples; sizes differ by at most one."""
    return [index * length // count for index in range(count + 1)]


def shares(micro_batches: int, workers: int) -> list[tuple[int, int]]:
    """Even contiguous ownership: worker `r` computes the micro-batches `[a, b)`."""
    return list(pairwise(pieces(micro_batches, workers)))
