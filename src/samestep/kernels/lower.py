"""Lower a recording of ATen operations to a program of kernels.

`aten` has a function for each operation, `fusion` then joins neighbours.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from samestep.errors import NotPortable
from samestep.kernels import fusion
from samestep.kernels.aten import LOWERINGS, advice, indexing
from samestep.kernels.aten.recurrent_calls import RecurrentCalls
from samestep.kernels.compositions import LOWERINGS as COMPOSITIONS
from samestep.kernels.compositions import materialise
from samestep.kernels.compositions.formula import Lowered
from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Lowering,
    Results,
    inputs,
)
from samestep.kernels.program import NONE, Buffer, Op, Program
from samestep.kernels.trace import Node, record
from samestep.kernels.values import (
    Activation,
    GradientSum,
    Integers,
    LossOp,
    Opaque,
    Places,
    SampleSum,
    TableGradient,
    Unknown,
    WeightGradient,
    Written,
)


def lower(
    module: nn.Module,
    input_shape: tuple[int, ...],
    places: Places,
    loss: LossOp,
    backward: bool = True,
    input_type: torch.dtype = torch.float32,
    why_not: Callable[[Tensor], str | None] = lambda _: None,
) -> Program:
    """Return the program of a module that takes inputs [b, *input_shape].

    They are floats, or tokens (int64). The module's modes decide what is recorded.
    `why_not` tells what has computed a constant whose bits are not portable.
    Raises NotPortable, which names every operation without a kernel.
    """
    named = (*module.named_parameters(), *module.named_buffers())
    constant = [name for name, _ in named if name not in places]
    trace = record(module, input_shape, backward, RecurrentCalls, input_type, constant)
    lowering = Lowering(trace, places, why_not=why_not)
    assert trace.inputs is not None
    x = lowering.activation(trace.inputs.shape)
    lowering.known[trace.inputs] = x
    if input_type == torch.int64:
        lowering.known[trace.inputs] = Integers(x.buffer, x.rows, dims=x.dims)
    kind = OpKind.LOAD if input_type == torch.float32 else OpKind.LOAD_TOKENS
    lowering.ops.append(Op(kind, [0, NONE, x.rows]))
    _lower_nodes(lowering, trace.nodes[: trace.num_forward])
    positions = _measure(lowering, loss, backward)
    last = lowering.ops[-1]
    _lower_nodes(lowering, trace.nodes[trace.num_forward :])
    if trace.has_other_draws:
        lowering.unknown.append(("random numbers of Python or NumPy", "the model"))
    if lowering.unknown:
        raise NotPortable(advice.refusal(lowering.unknown))
    lowering.ops[0].i[1] = lowering.by_sample.get(inputs(x.rows), NONE)
    ops = fusion.fuse(lowering.ops, lowering.buffers)
    num_forward = next(n for n, op in enumerate(ops) if op is last)
    return Program(
        tuple(ops),
        tuple(lowering.buffers),
        1,
        num_forward,
        lowering.streams > 0,
        positions,
        torch.cat(lowering.constants) if lowering.constants else None,
    )


def _lower_nodes(lowering: Lowering, nodes: list[Node]) -> None:
    gradients = {value: name for name, value in lowering.trace.gradients.items()}
    for node in nodes:
        arguments = [lowering.result_of(a) for a in node.arguments]
        functions = _functions(node.op)
        follows = _has_unknown(arguments)  # what is listed
        results = None
        if functions and not follows:
            results = _results(lowering, node, arguments, functions)
        if node.is_constant and (results is None or Opaque() in results):
            continue
        if results is None:
            if not (functions and follows):
                lowering.unknown.append((node.op, node.where))
            results = [Unknown()] * len(node.outputs)
        for value, result in zip(node.outputs, results, strict=True):
            lowering.known[value] = result
            if value in gradients:
                _write_gradient(lowering, gradients[value], result)


def _functions(op: str) -> list[Lowered]:
    """Return what may lower an operation; the first that does counts."""
    names = (op, _functional(op))
    every = [table.get(n) for table in (LOWERINGS, COMPOSITIONS) for n in names]
    return list(dict.fromkeys(function for function in every if function))


def _results(
    lowering: Lowering, node: Node, arguments: list[Any], functions: list[Lowered]
) -> Results:
    arguments = materialise.masks(lowering, node, arguments)
    for function in functions:
        results = function(lowering, node, arguments)
        if results is not None:
            return results
    given = list(map(lowering.given_for_ones, node.arguments, arguments))
    given = materialise.parameters(lowering, given)
    if given == arguments:
        return None
    found = (function(lowering, node, given) for function in functions)
    return next((results for results in found if results is not None), None)


def _functional(op: str) -> str:
    """Return the operation that makes a new tensor instead of changing one."""
    name, _, overload = op.removeprefix("aten.").partition(".")
    return f"aten.{name.removesuffix('_')}.{overload}"


def _has_unknown(arguments: list[Any]) -> bool:
    return any(
        _has_unknown(a) if isinstance(a, list) else isinstance(a, Unknown)
        for a in arguments
    )


def _measure(lowering: Lowering, loss: LossOp, backward: bool) -> int:
    """Append the loss, which also begins the backward pass.

    Returns how many positions of a sample have a target: classes are the last dimension
    of the outputs.
    """
    outputs = lowering.result_of(lowering.trace.outputs)
    if not isinstance(outputs, Activation):
        lowering.gradient = Unknown()
        return 1
    outputs = lowering.whole(outputs)
    i, f = [outputs.buffer, outputs.rows], list[float]()
    if loss.kind != OpKind.STORE:
        written = NONE
        if backward:
            lowering.gradient = gradient = lowering.like(outputs.dims)
            written = gradient.buffer
        i = [outputs.buffer, written, outputs.rows]
    positions = 1
    if loss.kind == OpKind.CROSS_ENTROPY:
        i[2] = outputs.shape[-1]
        positions = outputs.rows // i[2]
        i, f = [*i, loss.ignored, positions], [loss.smoothing]
    lowering.ops.append(Op(loss.kind, i, f))
    return positions


def _write_gradient(lowering: Lowering, name: str, result: Any) -> None:
    """Append what writes the gradient of a parameter."""
    place = lowering.places.parameters[name]
    if isinstance(result, GradientSum):
        _write_sum(lowering, place, result.parts)
    else:
        _write_one(lowering, place, result)


def _write_sum(lowering: Lowering, place: int, parts: tuple[Any, ...]) -> None:
    """Append what writes the gradients of several uses of a parameter, and adds them.

    They stay apart until each micro-batch's are added.
    """
    number, size = len(lowering.buffers), 0
    lowering.buffers.append(Buffer(0, is_by_micro_batch=True))
    for use, part in enumerate(parts):
        _write_one(lowering, 0, part)
        op = lowering.ops[-1]
        size = _elements(op)
        op.i += [0] * (27 - len(op.i)) + [use, size, number]
        op.flags |= OpFlag.LEAVES
    features = len(parts) * size
    lowering.buffers[number] = Buffer(features, is_by_micro_batch=True)
    i = [number, len(parts), size, place]
    lowering.ops.append(Op(OpKind.ADD_LEAVES, i))


def _elements(op: Op) -> int:
    """Return how many elements of a gradient an operation writes."""
    match op.kind:
        case OpKind.LINEAR_GRAD_WEIGHT:
            return op.i[2] * op.i[3]
        case OpKind.EMBEDDING_GRAD:
            return op.i[2] * op.i[8]
    return op.i[1]


def _write_one(lowering: Lowering, place: int, result: Any) -> None:
    match result:
        case WeightGradient(gradient, x):
            dy, source = lowering.tokens(gradient), lowering.tokens(x)
            copy = lowering.transposed(source)
            i = [dy.buffer, copy, source.features, dy.features, place, *dy.numbers]
            lowering.ops.append(
                Op(OpKind.LINEAR_GRAD_WEIGHT, [*i, source.positions, 0, 1])
            )
        case TableGradient():
            indexing.write_table_gradient(lowering, place, result)
        case SampleSum(rows):
            rows = lowering.flat(rows)
            i = [rows.buffer, rows.size, place, rows.rows, rows.offset]
            lowering.ops.append(Op(OpKind.GRAD_BIAS, i))
        case Written(op, number):
            op.i[number] = place
