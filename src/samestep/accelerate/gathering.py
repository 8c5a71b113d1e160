"""Rows of all processes, put together in the order of the samples."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import concatenate, gather_object
from torch import Tensor


class Gathering:
    """Takes what the iterations of a script gather, for one global batch or round."""

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []
        """For each call in an iteration, what this process has so far."""
        self._calls = 0

    def begin(self, samples: int, is_last: bool) -> None:
        """Begin an iteration of `samples` samples; after the `is_last`, all gather."""
        self._samples, self._is_last, self._calls = samples, is_last, 0

    def __call__(self, value: Any) -> Any:
        """All processes: return the rows of all samples, if it is the last iteration.

        No rows in an earlier one.
        """
        if self._calls == len(self._rows):
            self._rows.append([])
        own = self._rows[self._calls]
        self._calls += 1
        own.append(_first(value, self._samples))
        if not self._is_last:
            return _first(value, 0)
        return _joined([rows for process in gather_object([own]) for rows in process])


def _first(value: Any, rows: int) -> Any:
    """Return the first rows of all tensors in `value`, or of a list of objects."""
    if isinstance(value, Tensor):
        return value.detach()[:rows] if value.ndim else value.detach()[None][:rows]
    if isinstance(value, Mapping):
        return {key: _first(each, rows) for key, each in value.items()}
    if isinstance(value, tuple) or _has_tensors(value):
        return type(value)(_first(each, rows) for each in value)
    return value[:rows]


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], list) and not any(map(_has_tensors, parts)):
        return [each for part in parts for each in part]
    return concatenate(parts)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(each, Tensor | Mapping | tuple) for each in value)
