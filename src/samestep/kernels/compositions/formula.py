"""Formulas of activations, as operations of a program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from samestep.kernels.interface import Binary, Unary
from samestep.kernels.lowering import (
    Lowering,
    Results,
)
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Parameter,
)


Operand = Activation | Parameter | float
"""The second operand of an operation; a number is rounded to float."""
Lowered = Callable[[Lowering, Node, list[Any]], Results]


class Mismatch(Exception):
    """A formula has no kernel for its operands."""


def lowered(formula: Callable[..., Any]) -> Lowered:
    """Return what lowers an operation by a function of a `Formula` and its arguments.

    The function returns one result or a list of them. Where it raises Mismatch, or
    takes other arguments, there is no kernel.
    """

    @wraps(formula)
    def lower(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
        before, streams = len(lowering.ops), lowering.streams
        try:
            result = formula(Formula(lowering, node), *arguments)
        except (Mismatch, TypeError):
            del lowering.ops[before:]
            lowering.streams = streams
            return None
        return result if isinstance(result, list) else [result]

    return lower


@dataclass(frozen=True)
class Formula:
    """What a formula is made of; all raise Mismatch."""

    lowering: Lowering
    node: Node

    def unary(
        self, function: Unary, x: Any, numbers: Sequence[float] = ()
    ) -> Activation:
        """Return f(x)."""
        return self.lowering.unary(function, activation(x), numbers)

    def binary(self, function: Binary, a: Any, b: Any) -> Activation:
        """Return f(a, b); `a` is an activation."""
        if not isinstance(b, Activation | Parameter | float | int):
            raise Mismatch
        result = self.lowering.binary(function, activation(a), b)
        if result is None:
            raise Mismatch
        return result

    def add(self, a: Any, b: Any) -> Activation:
        """Return a + b."""
        return self.binary(Binary.ADD, a, b)

    def sub(self, a: Any, b: Any) -> Activation:
        """Return a - b."""
        return self.binary(Binary.SUB, a, b)

    def mul(self, a: Any, b: Any) -> Activation:
        """Return a * b."""
        return self.binary(Binary.MUL, a, b)

    def div(self, a: Any, b: Any) -> Activation:
        """Return a / b."""
        return self.binary(Binary.DIV, a, b)

    def choose(self, mask: Any, a: Any, b: Any) -> Activation:
        """Return a where the mask is not 0, else b."""
        return self.add(
            self.binary(Binary.WHERE, a, mask), self.binary(Binary.WHERE_NOT, b, mask)
        )

    def filled(self, like: Activation, number: float) -> Activation:
        """Return a number in every element of a tensor like another."""
        return self.unary(Unary.FILL, like, [number])

    def sum(self, x: Any, dims: Any, divisor: float = 1.0) -> Activation:
        """Return the sum over dimensions, which stay with size 1, over `divisor`."""
        x = activation(x)
        dims = [dim % len(x.dims) for dim in dims]
        if x.samples_dim in dims:
            raise Mismatch
        return self.lowering.sum_rows(x, dims, divisor)

    def sum_of_sample(self, x: Activation, divisor: float = 1.0) -> Activation:
        """Return the sum of all elements of every sample, over `divisor`."""
        return self.lowering.sum_rows(x, range(len(x.dims)), divisor)

    def shaped(self, x: Activation) -> Activation:
        """Return the elements of a tensor with the shape of the operation's result."""
        shape = self.node.outputs[0].shape
        viewed = x.view(shape) or self.lowering.whole(x).view(shape)
        if viewed is None:
            raise Mismatch
        return viewed


def activation(x: Any) -> Activation:
    """Return an operand that must be an activation. Raises Mismatch."""
    if not isinstance(x, Activation):
        raise Mismatch
    return x
