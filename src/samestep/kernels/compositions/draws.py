"""Random numbers of a forward pass, from counters of the micro-batch and the sample."""

import math
from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import Binary, OpKind, Unary
from samestep.kernels.lowering import Lowerings
from samestep.kernels.program import Op
from samestep.kernels.values import Activation


STEP = 2.0**-24
"""How far apart uniform numbers are."""


def _drawn(formula: Formula, first: float) -> Activation:
    """Return numbers in [first, 1 + first) for every element of the result.

    Samples must be the first dimension: elements are counted from each one's first.
    """
    shape, lowering = formula.node.outputs[0].shape, formula.lowering
    if not shape or shape[0] == 0 or shape[0] % lowering.trace.samples:
        raise Mismatch
    y = lowering.activation(shape)
    lowering.ops.append(Op(OpKind.DRAW, [y.buffer, y.rows, lowering.streams], [first]))
    lowering.streams += 1
    return y


def _scaled(formula: Formula, x: Activation, factor: Any, summand: Any) -> Activation:
    if isinstance(factor, Activation) or factor != 1:
        x = formula.mul(x, factor)
    if isinstance(summand, Activation) or summand != 0:
        x = formula.add(x, summand)
    return x


def _rand(formula: Formula, *_: Any) -> Activation:
    return _drawn(formula, 0.0)


def _uniform(
    formula: Formula, _: Any, low: float = 0.0, high: float = 1.0, *rest: Any
) -> Activation:
    return _scaled(formula, _drawn(formula, 0.0), high - low, low)


def _standard(formula: Formula) -> Activation:
    """Return normal numbers, by the transform of Box and Muller (1958)."""
    logarithm = formula.unary(Unary.LOG, _drawn(formula, STEP))
    radius = formula.unary(Unary.SQRT, formula.mul(logarithm, -2.0))
    angle = formula.mul(_drawn(formula, 0.0), 2 * math.pi)
    return formula.mul(radius, formula.unary(Unary.COS, angle))


def _randn(formula: Formula, *_: Any) -> Activation:
    return _standard(formula)


def _normal_like(
    formula: Formula, _: Any, mean: float = 0.0, deviation: float = 1.0, *rest: Any
) -> Activation:
    return _scaled(formula, _standard(formula), deviation, mean)


def _normal(
    formula: Formula, mean: Any, deviation: Any = 1.0, *rest: Any
) -> Activation:
    return _scaled(formula, _standard(formula), deviation, mean)


def _exponential(formula: Formula, _: Any, rate: float = 1.0, *rest: Any) -> Activation:
    numbers = formula.unary(Unary.LOG, _drawn(formula, STEP))
    negative = formula.unary(Unary.NEG, numbers)
    return negative if rate == 1 else formula.div(negative, rate)


def _bernoulli(formula: Formula, probability: Any, *_: Any) -> Activation:
    activation(probability)
    return formula.binary(Binary.LESS, _drawn(formula, 0.0), probability)


def _bernoulli_(formula: Formula, _: Any, probability: Any, *rest: Any) -> Activation:
    return _bernoulli(formula, probability)


LOWERINGS: Lowerings = {
    "aten.bernoulli.default": lowered(_bernoulli),
    "aten.bernoulli_.Tensor": lowered(_bernoulli_),
    "aten.exponential_.default": lowered(_exponential),
    "aten.normal.Tensor_Tensor": lowered(_normal),
    "aten.normal.Tensor_float": lowered(_normal),
    "aten.normal.float_Tensor": lowered(_normal),
    "aten.normal_.default": lowered(_normal_like),
    "aten.rand.default": lowered(_rand),
    "aten.rand_like.default": lowered(_rand),
    "aten.randn.default": lowered(_randn),
    "aten.randn_like.default": lowered(_randn),
    "aten.uniform_.default": lowered(_uniform),
}
