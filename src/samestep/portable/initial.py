"""Initial weights that are the same on every processor, for any module.

While a model is built, a dispatch mode answers torch's random operations from counters
and computes functions by portable kernels, for any caller. It also follows what
torch itself has computed in an order of its own, and refuses it as a weight.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from samestep.core.plan import derive_seed
from samestep.errors import NotPortable
from samestep.portable import functions
from samestep.portable.draws import DRAWS, OfKey
from samestep.portable.exact import CHOOSING, OVERWRITING, SHAPING, is_exact


TORCH = str(Path(torch.__file__).parent)


@contextmanager
def from_counters(seed: int) -> Iterator["Building"]:
    """Draw every random number of the block from counters of a recipe's seed."""
    with Building(seed) as building:
        yield building


class Building(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers the operations of a model that is being built."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._drawn = seed, 0
        self._culprits: dict[int, tuple[Any, str]] = {}
        """Storages with results that are not portable, kept alive, and why."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import torch._dynamo, 0.9 s

    def check(self, model: nn.Module) -> None:
        """Raise NotPortable if weights or buffers are not portable."""
        named = (*model.named_parameters(), *model.named_buffers())
        reasons = {name: self.reason(tensor) for name, tensor in named}
        if parts := [f"`{n}`, computed by {why}" for n, why in reasons.items() if why]:
            raise NotPortable(
                "With portable arithmetic a model's initial weights and buffers must "
                "be the same on every processor, and torch's functions differ: "
                f"{'; '.join(parts)}. Compute them from elementwise operations or "
                'random numbers, load them from a file, or set `arithmetic = "torch"`.'
            )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        base = name.removesuffix("_") if not name.endswith("__") else name
        if base in DRAWS:
            return self._draw(func, base, args, kwargs)
        values = _function(base, args, kwargs)
        if values is None:
            result = func(*args, **kwargs)
            if base in functions.RANGES and result.is_floating_point():
                values = result.copy_(functions.RANGES[base](result, *args))
        else:
            result = values if name == base else args[0].copy_(values)
        if base in CHOOSING:
            _make_zeros_positive(result)
        is_known = values is not None or is_exact(func, base, args, kwargs, result)
        reason = self._inherited(base, args, kwargs)
        self._mark(result, reason if is_known else f"`{func}`{_line()}", base)
        return result

    def _draw(
        self, func: Any, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Draw the numbers of the next random operation."""
        key = derive_seed(self._seed, "model", self._drawn)
        self._drawn += 1
        is_in_place = func._schema.name.endswith("_")
        tensor = args[0] if is_in_place else func(*args, **kwargs)
        if tensor.device.type != "meta":
            named = named_arguments(func, args, kwargs)
            tensor.copy_(DRAWS[base](OfKey(key), tensor, named))
        self._mark(tensor, None, base)
        return tensor

    def _inherited(self, base: str, args: Any, kwargs: Any) -> str | None:
        """Return why a result is not portable, if its arguments are not."""
        if not self._culprits or base in SHAPING:
            return None
        if base in OVERWRITING:
            args = args[1:]
        reasons = map(self.reason, _tensors((args, kwargs)))
        return next((reason for reason in reasons if reason), None)

    def _mark(self, results: Any, reason: str | None, base: str) -> None:
        """Note whether results, and what shares their memory, are portable."""
        for tensor in _tensors(results):
            storage = _storage(tensor)
            if storage is None:
                continue
            if reason:
                self._culprits[storage._cdata] = storage, reason
            elif base in OVERWRITING and tensor.nbytes == storage.nbytes():
                self._culprits.pop(storage._cdata, None)

    def reason(self, tensor: Tensor) -> str | None:
        """Return what has computed a tensor that is not portable."""
        storage = _storage(tensor)
        if storage is None:
            return None
        _, reason = self._culprits.get(storage._cdata, (None, None))
        return reason


def _function(base: str, args: Any, kwargs: Any) -> Any:
    """Return the result of a function by portable kernels; None if it is another."""
    dtypes = functions.DTYPES.get(base, frozenset({torch.float32}))
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors or any(
        t.dtype not in dtypes or t.device.type != "cpu" for t in tensors
    ):
        return None
    if base in functions.NAMES:
        return functions.compute(base, args[0])
    other = functions.OTHERS.get(base)
    return other(*args, **kwargs) if other else None


def _make_zeros_positive(results: Any) -> None:
    for tensor in _tensors(results):
        if tensor.is_floating_point():
            tensor.add_(0.0)


def _storage(tensor: Tensor) -> Any:
    """Return the memory of a tensor; None if it has none of its own (sparse ones)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for part in nested:
            yield from _tensors(part)
    elif isinstance(nested, dict):
        yield from _tensors(list(nested.values()))


def named_arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by name, with the schema's defaults."""
    schema = func._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named |= {a.name: value for a, value in zip(schema, args, strict=False)}
    return named | kwargs


def _line() -> str:
    """Return the line of code outside of torch that is being executed, for messages."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    return f" ({frame.f_code.co_filename}:{frame.f_lineno})"
