"""Losses of `torch.nn.functional`, of every element or summed, and their gradients."""

import math
from collections.abc import Callable
from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.compositions.piecewise import softplus
from samestep.kernels.interface import Binary, OpKind, Unary
from samestep.kernels.losses import picks, sums
from samestep.kernels.lowering import Lowerings
from samestep.kernels.program import Op
from samestep.kernels.values import Activation, Constant


NONE, MEAN, SUM = range(3)
"""The reductions of PyTorch's losses."""
LEAST_LOG = -100.0
"""The smallest logarithm of a probability in `binary_cross_entropy`."""
LEAST_VARIANCE = 1e-12
"""The smallest p (1 - p) that divides its gradient."""


def _log_softmax(formula: Formula, x: Any, dim: int, *_: Any) -> Activation:
    x = activation(x)
    if x.samples_dim == dim % len(x.dims):
        raise Mismatch
    order = [*(n for n in range(len(x.dims)) if n != dim % len(x.dims)), dim]
    moved = formula.lowering.whole(x.permute([n % len(x.dims) for n in order]))
    y = formula.lowering.like(moved.dims)
    i = [moved.buffer, y.buffer, moved.rows, moved.shape[-1], 0, 1]
    formula.lowering.ops.append(Op(OpKind.SOFTMAX, i))
    order = [n % len(x.dims) for n in order]
    return y.permute([order.index(n) for n in range(len(order))])


def _log_softmax_backward(
    formula: Formula, dy: Any, y: Any, dim: int, *_: Any
) -> Activation:
    shares = formula.unary(Unary.EXP, y)
    return formula.sub(dy, formula.mul(shares, formula.sum(dy, (dim,))))


def _reduced(formula: Formula, each: Activation, reduction: int) -> Any:
    match reduction:
        case 0:
            return each
        case 1:
            return sums.mean(formula, each)
    return sums.total(formula, each)


def _weights(formula: Formula, weight: Any, target: Any) -> Activation | None:
    if weight is None:
        return None
    if not isinstance(weight, Constant):
        raise Mismatch
    return picks.rows(formula, weight, target)


def _nll(
    formula: Formula, x: Any, target: Any, weight: Any, reduction: int, ignored: int
) -> list[Any]:
    """Return the losses of log-probabilities [b, classes, ...], and their weight."""
    if reduction == MEAN:  # over the weights of a micro-batch
        raise Mismatch
    picked = picks.pick(formula, _classes_last(x), target)
    loss, factors = formula.unary(Unary.NEG, picked), _weights(formula, weight, target)
    if factors is not None:
        loss = formula.mul(loss, factors)
    loss = formula.binary(Binary.WHERE_NOT, loss, _is(formula, target, ignored))
    return [_reduced(formula, loss, reduction), None]


def _nll_backward(
    formula: Formula,
    dy: Any,
    x: Any,
    target: Any,
    weight: Any,
    reduction: int,
    ignored: int,
    *_: Any,
) -> Activation:
    is_ignored = _is(formula, target, ignored)
    zeros = formula.unary(Unary.FILL, is_ignored)
    dy = formula.unary(Unary.NEG, formula.add(zeros, dy))
    factors = _weights(formula, weight, target)
    if factors is not None:
        dy = formula.mul(dy, factors)
    dy = formula.binary(Binary.WHERE_NOT, dy, is_ignored)
    moved = _classes_last(x)
    dx = picks.spread(formula, dy, target, moved.shape[-1])
    count = len(dx.dims)
    return dx.permute([0, count - 1, *range(1, count - 1)])


def _classes_last(x: Any) -> Activation:
    classes_first = activation(x)
    return classes_first.permute([0, *range(2, len(classes_first.dims)), 1])


def _is(formula: Formula, target: Any, number: int) -> Activation:
    numbers = picks.numbers(formula, target)
    return formula.binary(Binary.EQUAL, numbers, float(number))


Pointwise = Callable[..., Activation]


def _loss(
    each: Pointwise, slope: Pointwise
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what lowers a loss of (x, t, *numbers), and its gradient.

    `slope` is the derivative by x. PyTorch's arguments are x, t, reduction, numbers;
    the gradient's come after dy.
    """

    def forward(
        formula: Formula, x: Any, t: Any, reduction: int = MEAN, *numbers: Any
    ) -> Any:
        return _reduced(formula, each(formula, x, t, *numbers), reduction)

    def backward(
        formula: Formula, dy: Any, x: Any, t: Any, reduction: int, *numbers: Any
    ) -> Activation:
        return formula.mul(
            slope(formula, x, t, *numbers), _scaled(formula, dy, x, reduction)
        )

    return forward, backward


def _scaled(formula: Formula, dy: Any, x: Any, reduction: int) -> Activation:
    """Return the gradient of every element's loss."""
    if reduction == MEAN:
        return formula.div(dy, float(math.prod(activation(x).shape)))
    return activation(dy)


def _squared(formula: Formula, x: Any, t: Any) -> Activation:
    away = formula.sub(x, t)
    return formula.mul(away, away)


def _squared_slope(formula: Formula, x: Any, t: Any) -> Activation:
    return formula.mul(formula.sub(x, t), 2.0)


def _huber(formula: Formula, x: Any, t: Any, delta: float = 1.0) -> Activation:
    """Return d^2 / 2 for |d| <= delta, else delta (|d| - delta / 2)."""
    size = formula.unary(Unary.ABS, formula.sub(x, t))
    square = formula.mul(formula.mul(size, size), 0.5)
    line = formula.mul(formula.sub(size, delta / 2), delta)
    return formula.choose(formula.binary(Binary.AT_MOST, size, delta), square, line)


def _huber_slope(formula: Formula, x: Any, t: Any, delta: float = 1.0) -> Activation:
    away = formula.sub(x, t)
    above = formula.binary(Binary.MAX, away, -delta)
    return formula.binary(Binary.MIN, above, delta)


def _smooth_l1(formula: Formula, x: Any, t: Any, beta: float = 1.0) -> Activation:
    """Return d^2 / (2 beta) for |d| < beta, else |d| - beta / 2."""
    size = formula.unary(Unary.ABS, formula.sub(x, t))
    if beta == 0:
        return size
    square = formula.div(formula.mul(formula.mul(size, size), 0.5), beta)
    line = formula.sub(size, beta / 2)
    return formula.choose(formula.binary(Binary.LESS, size, beta), square, line)


def _smooth_l1_slope(formula: Formula, x: Any, t: Any, beta: float = 1.0) -> Activation:
    away = formula.sub(x, t)
    if beta == 0:
        above = formula.binary(Binary.GREATER, away, 0.0)
        return formula.sub(above, formula.binary(Binary.LESS, away, 0.0))
    above = formula.binary(Binary.MAX, formula.div(away, beta), -1.0)
    return formula.binary(Binary.MIN, above, 1.0)


def _soft_margin(formula: Formula, x: Any, t: Any) -> Activation:
    return softplus(formula, formula.unary(Unary.NEG, formula.mul(x, t)))


def _soft_margin_slope(formula: Formula, x: Any, t: Any) -> Activation:
    flipped = formula.unary(Unary.NEG, formula.mul(x, t))
    share = formula.unary(Unary.SIGMOID, flipped)
    return formula.unary(Unary.NEG, formula.mul(share, t))


def _bce(
    formula: Formula, p: Any, t: Any, weight: Any = None, reduction: int = MEAN
) -> Any:
    """Return -(t max(log p, -100) + (1 - t) max(log(1 - p), -100))."""
    log, of_rest = (
        formula.binary(Binary.MAX, formula.unary(function, x), LEAST_LOG)
        for function, x in (
            (Unary.LOG, p),
            (Unary.LOG1P, formula.unary(Unary.NEG, p)),
        )
    )
    # (t - 1) log(1 - p) - t log p, as PyTorch orders it
    loss = formula.sub(formula.mul(formula.sub(t, 1.0), of_rest), formula.mul(t, log))
    return _reduced(formula, _weighed(formula, loss, weight), reduction)


def _bce_backward(
    formula: Formula, dy: Any, p: Any, t: Any, weight: Any = None, reduction: int = MEAN
) -> Activation:
    rest = formula.add(formula.unary(Unary.NEG, p), 1.0)
    variance = formula.binary(Binary.MAX, formula.mul(rest, p), LEAST_VARIANCE)
    slope = formula.div(formula.sub(p, t), variance)
    dx = formula.mul(slope, _scaled(formula, dy, p, reduction))
    return _weighed(formula, dx, weight)


def _bce_with_logits(
    formula: Formula,
    x: Any,
    t: Any,
    weight: Any = None,
    of_positive: Any = None,
    reduction: int = MEAN,
) -> Any:
    """Return (1 - t) x + (1 + (t w - t)) softplus(-x)."""
    rest = formula.mul(formula.add(formula.unary(Unary.NEG, t), 1.0), x)
    log = softplus(formula, formula.unary(Unary.NEG, x))
    if of_positive is not None:
        less = formula.sub(formula.mul(t, of_positive), t)
        log = formula.mul(log, formula.add(less, 1.0))
    loss = _weighed(formula, formula.add(rest, log), weight)
    return _reduced(formula, loss, reduction)


def _weighed(formula: Formula, x: Activation, weight: Any) -> Activation:
    return x if weight is None else formula.mul(x, weight)


def _xlogy(formula: Formula, x: Any, y: Any) -> Activation:
    """Return x log y, and 0 for x = 0 unless y is a NaN."""
    product = formula.mul(x, formula.unary(Unary.LOG, y))
    is_zero = formula.binary(Binary.EQUAL, x, 0.0)
    is_number = formula.binary(Binary.EQUAL, y, y)
    drops = formula.binary(Binary.WHERE, is_zero, is_number)
    return formula.binary(Binary.WHERE_NOT, product, drops)


_MSE = _loss(_squared, _squared_slope)
_SMOOTH_L1 = _loss(_smooth_l1, _smooth_l1_slope)
_HUBER = _loss(_huber, _huber_slope)
_SOFT_MARGIN = _loss(_soft_margin, _soft_margin_slope)

LOWERINGS: Lowerings = {
    "aten._log_softmax.default": lowered(_log_softmax),
    "aten._log_softmax_backward_data.default": lowered(_log_softmax_backward),
    "aten.binary_cross_entropy.default": lowered(_bce),
    "aten.binary_cross_entropy_backward.default": lowered(_bce_backward),
    "aten.binary_cross_entropy_with_logits.default": lowered(_bce_with_logits),
    "aten.huber_loss.default": lowered(_HUBER[0]),
    "aten.huber_loss_backward.default": lowered(_HUBER[1]),
    "aten.mse_loss.default": lowered(_MSE[0]),
    "aten.mse_loss_backward.default": lowered(_MSE[1]),
    "aten.nll_loss2d_backward.default": lowered(_nll_backward),
    "aten.nll_loss2d_forward.default": lowered(_nll),
    "aten.nll_loss_backward.default": lowered(_nll_backward),
    "aten.nll_loss_forward.default": lowered(_nll),
    "aten.smooth_l1_loss.default": lowered(_SMOOTH_L1[0]),
    "aten.smooth_l1_loss_backward.default": lowered(_SMOOTH_L1[1]),
    "aten.soft_margin_loss.default": lowered(_SOFT_MARGIN[0]),
    "aten.soft_margin_loss_backward.default": lowered(_SOFT_MARGIN[1]),
    "aten.xlogy.Tensor": lowered(_xlogy),
}
