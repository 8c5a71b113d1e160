"""How samples reach a program, and what a loss of the user's own measures of them."""

import math
from typing import Any

from samestep.kernels.aten import advice
from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import Lowering
from samestep.kernels.program import NONE, Op
from samestep.kernels.tensors import Axis
from samestep.kernels.trace import Node, Value
from samestep.kernels.values import Activation, Integers, SampleSum, Unknown


def load(lowering: Lowering) -> None:
    """Append what loads the inputs, and the targets of a loss of the user's own."""
    trace = lowering.trace
    _load(lowering, trace.inputs)
    if trace.targets is not None:
        _load(lowering, [trace.targets], are_targets=True)


def _load(lowering: Lowering, values: list[Value], are_targets: bool = False) -> None:
    """Append the loads of tensors, which are columns of one matrix for each type."""
    loaded = [lowering.activation(value.shape) for value in values]
    is_float = [value.dtype.is_floating_point for value in values]
    columns = {True: 0, False: 0}
    ops = []
    for x, floats in zip(loaded, is_float, strict=True):
        kind = OpKind.LOAD if floats else OpKind.LOAD_TOKENS
        ops.append(Op(kind, [x.buffer, NONE, x.rows, columns[floats], 0]))
        columns[floats] += x.rows
    for value, x, floats, op in zip(values, loaded, is_float, ops, strict=True):
        if columns[floats] != x.rows:
            op.i[4] = columns[floats]
        op.i.append(int(are_targets))
        lowering.ops.append(op)
        lowering.known[value] = x if floats else Integers(x.buffer, x.rows, dims=x.dims)


def measure(lowering: Lowering, backward: bool) -> int:
    """Append what a loss of the user's own measures, and begin the backward pass.

    Returns how many targets a sample has.
    """
    assert lowering.trace.targets is not None
    positions = math.prod(lowering.trace.targets.shape[1:])
    cells = [_cell(lowering, part) for part in lowering.trace.measured]
    lowering.gradient = Unknown()
    found = [cell for cell in cells if cell is not None]
    if len(found) < len(cells):
        return positions
    whole = lowering.like(((Axis(len(cells), 1),) if len(cells) > 1 else (),))
    for number, cell in enumerate(found):
        place = whole.select(0, number)
        assert place is not None
        lowering.copy(cell, place)
    written = NONE
    if backward:
        lowering.gradient = lowering.like(())
        written = lowering.gradient.buffer
    lowering.ops.append(Op(OpKind.MEASURE, [whole.buffer, written, len(cells)]))
    return positions


def _cell(lowering: Lowering, part: Any) -> Activation | None:
    """Return a sample's share of what is measured, [1]; None if it is unknown."""
    samples = lowering.trace.samples
    result = lowering.result_of(part)
    match result:
        case SampleSum(rows, divisions=0) if rows.size == 1:
            return rows
        case int() if result % samples == 0:
            share = lowering.like(())
            lowering.fill(share, result / samples)
            return share
        case Unknown():
            return None
    is_mean = isinstance(result, SampleSum) and result.divisions
    lowering.unknown.append((advice.MEAN if is_mean else advice.NO_SUM, "the loss"))
    return None


def mixes(lowering: Lowering, node: Node, arguments: list[Any]) -> bool:
    """Return whether an operation combines samples of a micro-batch with each other."""
    samples, shapes = lowering.trace.samples, [value.shape for value in node.outputs]
    grids = (sum(n > 0 and n % samples == 0 for n in shape) > 1 for shape in shapes)
    return any(map(_is_sum, arguments)) or any(grids)


def _is_sum(argument: Any) -> bool:
    if isinstance(argument, list):
        return any(map(_is_sum, argument))
    return isinstance(argument, SampleSum)
