"""A check, before the training, of a recorded program beside PyTorch itself.

The user's own module may combine operations as no test of ours has. So one micro-batch
is computed both ways, with the same dropout; gradients must agree up to rounding.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samestep.data import pytree
from samestep.errors import NotPortable
from samestep.kernels.aten.recurrent_calls import LayerByLayer
from samestep.kernels.execution import Execution
from samestep.kernels.interface import Kernels
from samestep.kernels.program import Program
from samestep.models.objective import Objective
from samestep.portable import inputs
from samestep.portable.draws import FRACTIONS
from samestep.portable.initial import named_arguments
from samestep.state import dtypes
from samestep.state.flat import Flat, dense


TOLERANCE = 1e-3
"""The largest difference, relative to the L2 norm of a parameter's gradient."""
OF_WHOLE = 1e-5
"""And relative to that of the whole gradient, which a parameter may have instead."""
FACTOR = 10.0
"""How much further than PyTorch's the gradients may be from those in float64."""


@dataclass(frozen=True)
class BesideTorch:
    """What computes a micro-batch both ways."""

    program: Program
    """What was recorded; it loads its inputs as floats."""
    objective: Objective
    flat: Flat
    parameters: Tensor
    """[size]: what the model's parameters are views of."""
    kernels: Kernels
    key: int
    """The key of the micro-batch's random numbers."""

    def check(self, given: Any, targets: Tensor) -> None:
        """Compare the gradients of a micro-batch, and what an own loss measures.

        Raises NotPortable.
        """
        ours, our_sums = self.recorded(given, targets)
        torchs, sums = self.eager(self.objective, given, targets)
        if self.program.cells:
            self._compare_sums(our_sums, sums)
        names = [entry.name for entry in self.flat.layout.parameters]
        differ = _differing(ours, torchs)
        if not differ:
            return
        double = copy.deepcopy(self.objective).double()
        exact, _ = self.eager(double, given, targets)
        differ = [
            n
            for n in differ
            # The negation: where ours has a NaN, the distance is no number either.
            if torchs[n].isfinite().all()
            and not _distance(ours[n], exact[n])
            <= FACTOR * _distance(torchs[n], exact[n])
        ]
        if differ:
            worst = max(differ, key=lambda n: _distance(ours[n], exact[n]))
            share = _distance(ours[worst], exact[worst]) / max(
                1e-30, exact[worst].norm()
            )
            raise NotPortable(
                "A recorded program has the gradients of the model, up to rounding, "
                f"and that of `{names[worst]}` differs from PyTorch's by {share:.0e} "
                "of its norm: please report this. Until then, set "
                '`arithmetic = "torch"`.'
            )

    def _compare_sums(self, ours: Sequence[float], torchs: Sequence[float]) -> None:
        """Compare the loss, and the cells of metrics. Raises NotPortable."""
        names = ["loss", *(f"number {n} of the metrics" for n in range(1, len(ours)))]
        for name, a, b in zip(names, ours, torchs, strict=True):
            # An answer that is as good as another may be a right one or not.
            allowed = TOLERANCE * abs(b) + (name != "loss")
            if not abs(a - b) <= allowed and math.isfinite(b):
                raise NotPortable(
                    f"A recorded program measures what the loss does, and its {name} "
                    f"is {a:.6g} instead of {b:.6g} for the first micro-batch. Does "
                    "the loss have numbers that depend on the size of a micro-batch, "
                    "such as a division by it, or on earlier calls? Return sums, or "
                    'set `arithmetic = "torch"`.'
                )

    def recorded(
        self, given: Any, targets: Tensor
    ) -> tuple[list[Tensor], Sequence[float]]:
        """Return a program's gradients of a micro-batch, float64, and its sums."""
        size, flat = len(targets), self.flat
        execution = Execution(self.program, self.kernels, size, 1)
        slot = torch.zeros(flat.size + flat.tail)
        execution.bind(parameters=self.parameters, running=flat.saved_buffers())
        execution.bind_micro_batches(torch.tensor([0, size]), torch.tensor([0]))
        execution.bind_slots([slot], flat.size)
        execution.keys[0], execution.call.weight = self.key, 1.0
        inputs.load_samples(execution, given, targets)
        execution.run()
        gradients = [view.double() for view in flat.views(slot[: flat.size])]
        return gradients, execution.cell_sums[0].tolist()

    def eager(
        self, objective: Objective, given: Any, targets: Tensor
    ) -> tuple[list[Tensor], Sequence[float]]:
        """Return PyTorch's, in the precision of the objective, with the same draws."""
        parameters = [p for p in objective.model.parameters() if p.requires_grad]
        dtype = parameters[0].dtype
        given = pytree.apply(
            lambda x: x.to(dtype) if x.is_floating_point() else x, given
        )
        if targets.is_floating_point():
            targets = targets.to(dtype)
        draws = ProgramDraws(self.key, self.program.mask_dims, len(targets))
        with draws, LayerByLayer(), dtypes.default(dtype):
            loss, cells = objective(given, targets)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.flat.restore_buffers()
        gradients = [
            torch.zeros_like(p, dtype=torch.float64) if g is None else dense(g).double()
            for p, g in zip(parameters, found, strict=True)
        ]
        return gradients, [loss.item(), *cells.tolist()]


class ProgramDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives eager operations the numbers that a program draws for a micro-batch.

    It has `samples` samples; `dims` are `Program.mask_dims`.
    """

    def __init__(self, key: int, dims: Sequence[int], samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._key, self._stream, self._samples = key, 0, samples
        self._dims = iter(dims)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import torch._dynamo, 0.9 s

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        if func is torch.ops.aten.bernoulli_.float:
            result = func(*args, **(kwargs or {}))
            kept = args[1] if len(args) > 1 else 0.5
            numbers = _numbers(self._key, self._stream, result.numel())
            limit = int(np.float64(np.float32(1 - kept)) * 2.0**32 + 0.5)
            mask = torch.from_numpy(numbers >= np.uint32(min(limit, 2**32 - 1)))
            result.copy_(self._ordered(mask, result.shape))
            self._stream += 1
        elif name in FRACTIONS:
            named = named_arguments(func, args, kwargs or {})
            result = func(*args, **(kwargs or {}))
            result.copy_(FRACTIONS[name](self, result, named))
        else:
            result = func(*args, **(kwargs or {}))
        return result

    def first(self, size: int) -> NDArray[np.float32]:
        """Draw float32 [size] in [0, 1) from the next stream."""
        numbers = _numbers(self._key, self._stream, size) >> np.uint32(8)
        self._stream += 1
        return np.asarray(numbers.astype(np.float32) * np.float32(2**-24))

    second = first

    def _ordered(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """Return what was drawn sample by sample, as a tensor of this shape."""
        dim = next(self._dims, 0)
        if dim == 0:
            return mask.view(shape)
        outer, inner = shape[:dim], (shape[dim] // self._samples, *shape[dim + 1 :])
        drawn = mask.view(self._samples, *outer, *inner)
        return drawn.movedim(0, dim).reshape(shape)


def _numbers(key: int, stream: int, size: int) -> Any:
    """Draw uint32 [size], as the kernels do for dropout."""
    element = np.arange(size, dtype=np.uint64).astype(np.uint32)
    high = (key >> 32) + stream * 0x85EBCA6B & 0xFFFFFFFF
    x = _mix(element * np.uint32(0x9E3779B9) + np.uint32(key & 0xFFFFFFFF))
    return _mix(x ^ np.uint32(high))


def _mix(x: Any) -> Any:
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x735A2D97)
    return x ^ x >> np.uint32(15)


def _differing(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[int]:
    """Return the numbers of the parameters whose gradients differ too much."""
    whole = sum(float(g.norm()) ** 2 for g in theirs) ** 0.5
    return [
        n
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if not _distance(a, b) <= TOLERANCE * float(b.norm()) + OF_WHOLE * whole
    ]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())
