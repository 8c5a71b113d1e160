"""One recording for batches of any size, out of two of few samples.

What grows with the samples differs between both; everything else is equal. So the
dimension of the samples is known wherever it appears, and nothing large is computed.
"""

from collections.abc import Callable, Iterator
from itertools import count, zip_longest
from typing import Any

import torch
from torch import Tensor

from samestep.errors import NotPortable, NotReproducible
from samestep.kernels.trace import Trace, Value, values_of


FEW, MORE = 2, 3
"""Samples of the recordings; one would be repeated where it must not be."""
LEAST = 61
"""The least number that may stand for that of the samples."""
BY_CHANCE = ("empty", "mkldnn_rnn_layer")
"""Parts of names of operations whose memory, or scratch memory, is as it was before."""
EQUALITIES = ("aten.eq.Scalar", "aten.eq.Tensor", "aten.ne.Scalar", "aten.ne.Tensor")
"""Operations of two counts whose result is the same for any number of samples."""
END = 1 << 40
"""Larger numbers stand for the end of a dimension."""


def for_any_batch(record: Callable[[int], Trace]) -> Trace:
    """Return a recording of samples of which no other of its numbers is a multiple.

    So a multiple of them is the samples'. `record` takes their number.
    Raises NotPortable where a model computes with that number, NotReproducible where
    it computes something else in each call.
    """
    few, more = record(FEW), record(MORE)
    if more.has_other_draws:
        raise NotPortable(
            "With portable arithmetic all random numbers are those of torch, and the "
            "model draws random numbers of Python or NumPy: use those of torch, or set "
            '`arithmetic = "torch"`.'
        )
    is_same = _operations(few, constant=False) == _operations(more, constant=False)
    if is_same and _operations(few) != _operations(more):
        few, more = record(FEW), record(MORE)  # the first call made constants
    try:
        return _Growth(few, more).trace()
    except _Different as error:
        found = error
    try:
        _Growth(few, record(FEW)).trace()
    except _Different:
        raise NotReproducible(
            "A model computes the same in each call, and this one has other "
            f"operations or numbers when it is called again{found}: it remembers "
            "earlier calls (an attribute, a cache, a counter), or branches by random "
            "numbers."
        ) from None
    raise NotPortable(
        "With portable arithmetic a model is recorded once for batches of any size, "
        f"and this one computes with the number of samples{found}: let it depend on "
        'each sample alone, or set `arithmetic = "torch"`.'
    )


def _operations(trace: Trace, constant: bool = True) -> list[str]:
    """Return the operations of a recording, perhaps without those of constants."""
    return [node.op for node in trace.nodes if constant or not node.is_constant]


class _Different(Exception):
    """Recordings differ by more than their samples; the text says where."""


class _Growth:
    """How two recordings differ, as both are walked through together."""

    def __init__(self, few: Trace, more: Trace) -> None:
        self._few, self._more = few, more
        numbers = {n for n in _numbers(more) if n}
        self._samples = next(s for s in count(LEAST) if all(n % s for n in numbers))
        self._done: set[Value] = set()
        self._where = ""
        self._counts: set[Value] = set()
        """Constants that are in proportion to the samples."""
        self._random: set[Value] = set()
        """What memory had by chance, and what is computed from it."""

    def trace(self) -> Trace:
        """Return `more`, grown to more samples. Raises _Different."""
        few, more = self._few, self._more
        self._grown([*few.inputs, few.targets], [*more.inputs, more.targets])
        for a, b in zip_longest(few.nodes, more.nodes):
            node = b or a
            self._where = f" in `{node.op}` ({node.where})"
            if a is None or b is None or a.op != b.op:
                raise _Different(self._where)
            if any(name in b.op for name in BY_CHANCE):
                self._random.update(values_of(b.arguments), b.outputs)
            given = list(b.arguments)
            b.arguments[:] = self._grown(a.arguments, given)
            are_counts = all(map(self._is_count, a.arguments, given))
            if b.op not in EQUALITIES or not are_counts:
                self._refuse_counts(b.arguments)
            if not self._random.isdisjoint(values_of(b.arguments)):
                self._random.update(b.outputs)
            self._grown(a.outputs, b.outputs)
        self._grown(few.outputs, more.outputs)
        more.measured = self._grown(few.measured, more.measured)
        self._refuse_counts([more.outputs, *more.measured])
        more.samples = self._samples
        return more

    def _is_count(self, a: Any, b: Any) -> bool:
        return b in self._counts if isinstance(b, Value) else a != b

    def _refuse_counts(self, arguments: list[Any]) -> None:
        if not self._counts.isdisjoint(values_of(arguments)):
            raise _Different(self._where)

    def _grown(self, a: Any, b: Any) -> Any:
        """Return what corresponds to both in the larger batch; values are changed."""
        match a, b:
            case Value(), Value():
                if b not in self._done:
                    self._done.add(b)
                    self._grow_data(a, b)
                    b.shape = tuple(map(self._size, a.shape, b.shape))
                return b
            case ([*_], [*_]) if type(a) is type(b) and len(a) == len(b):
                return type(b)(map(self._grown, a, b))
            case {**first}, {**second} if first.keys() == second.keys():
                return {key: self._grown(a[key], b[key]) for key in b}
            case int(), int():
                return self._size(a, b)
        is_nan = a != a and b != b
        if type(a) is type(b) and (a == b or is_nan):
            return b
        raise _Different(self._where)

    def _size(self, a: int, b: int) -> int:
        if a == b:
            return b
        if a * self._more.samples != b * self._few.samples:
            raise _Different(self._where)
        return b // self._more.samples * self._samples

    def _grow_data(self, a: Value, b: Value) -> None:
        """Give a constant all samples; forget it if theirs are not known.

        Raises _Different if it differs otherwise than in proportion to the samples.
        """
        x, y = a.data, b.data
        if (x is None and y is None) or (b in self._random and a.shape == b.shape):
            return
        if a.shape != b.shape:
            b.data = (
                None if x is None or y is None else _grown_data(x, y, self._samples)
            )
        elif x is None or y is None:
            raise _Different(self._where)
        elif not _are_same(x, y):
            if not _are_same(x * self._more.samples, y * self._few.samples):
                raise _Different(self._where)
            self._counts.add(b)


def _grown_data(few: Tensor, more: Tensor, samples: int) -> Tensor | None:
    """Return a constant of all samples, or None if few of them do not tell.

    Those of one sample are equal to another's, or integers that grow by one step.
    """
    common = more[tuple(map(slice, few.shape))]
    if not _are_same(few, common):
        return None
    for dim in [d for d, size in enumerate(few.shape) if size != more.shape[d]]:
        each = more.shape[dim] // MORE
        shape = (*more.shape[:dim], MORE, each, *more.shape[dim + 1 :])
        parts = more.reshape(shape).movedim(dim, 0)
        grown = parts[:1].expand(samples, *parts.shape[1:])
        if not (more.is_floating_point() or more.dtype == torch.bool):
            steps = torch.arange(samples).view(-1, *(1,) * (parts.dim() - 1))
            grown = (grown + steps * (parts[1] - parts[0])).to(more.dtype)
        if not _are_same(grown[:MORE], parts):
            return None
        more = grown.movedim(0, dim).flatten(dim, dim + 1)
    return more


def _are_same(x: Tensor, y: Tensor) -> bool:
    return bool(((x == y) | ((x != x) & (y != y))).all())


def _numbers(part: Any) -> Iterator[int]:
    """Yield the sizes and other numbers of a recording that are no "to the end"."""
    match part:
        case Trace():
            yield from _numbers([*part.inputs, part.targets, *part.measured])
            for node in part.nodes:
                yield from _numbers([*node.arguments, *node.outputs])
        case Value():
            yield from part.shape
        case list() | tuple():
            for one in part:
                yield from _numbers(one)
        case dict():
            yield from _numbers(list(part.values()))
        case int() if part < END:
            yield part
