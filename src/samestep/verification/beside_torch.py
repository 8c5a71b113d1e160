"""A check, before the training, of a recorded program beside PyTorch itself.

The user's own module may combine operations as no test of ours has. So one micro-batch
is computed both ways, with the same dropout; gradients must agree up to rounding.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samestep.errors import NotPortable, NotReproducible
from samestep.kernels.execution import Execution
from samestep.kernels.interface import Kernels
from samestep.kernels.program import Program
from samestep.models.objective import Objective
from samestep.portable import inputs
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

    record: Callable[[], Program]
    """Records a program that loads its inputs as floats."""
    objective: Objective
    flat: Flat
    parameters: Tensor
    """[size]: what the model's parameters are views of."""
    kernels: Kernels
    key: int
    """The key of the micro-batch's random numbers."""

    def check(self, given: Any, targets: Tensor) -> None:
        """Compare the gradients of a micro-batch.

        Raises NotPortable, NotReproducible.
        """
        program = self.record()
        ours = self._recorded(program, given, targets)
        torchs = self._eager(self.objective, given, targets)
        names = [entry.name for entry in self.flat.layout.parameters]
        differ = _differing(ours, torchs)
        if not differ:
            return
        exact = self._eager(copy.deepcopy(self.objective).double(), given, targets)
        differ = [
            n
            for n in differ
            # The negation: where ours has a NaN, the distance is no number either.
            if torchs[n].isfinite().all()
            and not _distance(ours[n], exact[n])
            <= FACTOR * _distance(torchs[n], exact[n])
        ]
        if differ and self.record().sha256 != program.sha256:
            raise NotReproducible(
                "A model computes the same in each call, and this one has other "
                "operations or numbers when it is called again: it remembers earlier "
                "calls (an attribute, a cache, a counter)."
            )
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

    def _recorded(self, program: Program, given: Any, targets: Tensor) -> list[Tensor]:
        size, flat = len(targets), self.flat
        execution = Execution(program, self.kernels, size, 1)
        slot = torch.zeros(flat.size + flat.tail)
        execution.bind(parameters=self.parameters, running=flat.saved_buffers())
        execution.bind_micro_batches(torch.tensor([0, size]), torch.tensor([0]))
        execution.bind_slots([slot], flat.size)
        execution.keys[0], execution.call.weight = self.key, 1.0
        inputs.load_samples(execution, given, targets)
        execution.run()
        return [view.double() for view in flat.views(slot[: flat.size])]

    def _eager(self, objective: Objective, given: Any, targets: Tensor) -> list[Tensor]:
        parameters = [p for p in objective.model.parameters() if p.requires_grad]
        dtype = parameters[0].dtype
        if given.is_floating_point():
            given = given.to(dtype)
        if targets.is_floating_point():
            targets = targets.to(dtype)
        with ProgramDraws(self.key), dtypes.default(dtype):
            loss, _ = objective(given, targets)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.flat.restore_buffers()
        return [
            torch.zeros_like(p, dtype=torch.float64) if g is None else dense(g).double()
            for p, g in zip(parameters, found, strict=True)
        ]


class ProgramDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives eager dropouts the masks that a program draws for a micro-batch."""

    def __init__(self, key: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._key, self._stream = key, 0

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
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bernoulli_.float:
            kept = args[1] if len(args) > 1 else 0.5
            numbers = _numbers(self._key, self._stream, result.numel())
            limit = int(np.float64(np.float32(1 - kept)) * 2.0**32 + 0.5)
            mask = torch.from_numpy(numbers >= np.uint32(min(limit, 2**32 - 1)))
            result.copy_(mask.view(result.shape))
            self._stream += 1
        return result


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
