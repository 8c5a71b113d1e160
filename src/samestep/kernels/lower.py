"""Lower a recording of ATen operations to a program of kernels.

`aten` has a function for each operation, `fusion` then joins neighbours.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from samestep.errors import NotPortable
from samestep.kernels import fusion
from samestep.kernels.aten import LOWERINGS, advice, indexing
from samestep.kernels.batches import for_any_batch
from samestep.kernels.compositions import AFTERWARDS, materialise
from samestep.kernels.compositions import LOWERINGS as COMPOSITIONS
from samestep.kernels.compositions.formula import Lowered
from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.losses import LOWERINGS as LOSSES
from samestep.kernels.losses import samples
from samestep.kernels.losses.calls import whole_calls
from samestep.kernels.lowering import (
    Lowering,
    Results,
    inputs,
)
from samestep.kernels.program import NONE, Buffer, Op, Program
from samestep.kernels.trace import Inputs, Kind, Node, OwnLoss, record
from samestep.kernels.values import (
    Activation,
    GradientSum,
    JoinedGradients,
    LossOp,
    Opaque,
    Parameter,
    Places,
    SampleSum,
    TableGradient,
    Unknown,
    WeightGradient,
    Written,
)


SMALL = (torch.uint8, torch.int8, torch.int16)
TABLES = (LOWERINGS, COMPOSITIONS, LOSSES, AFTERWARDS)
LINEAR = (
    *("clone.default", "div.Scalar", "div.Tensor", "embedding_dense_backward.default"),
    *("expand.default", "mul.Scalar", "mul.Tensor", "neg.default", "permute.default"),
    *("select.int", "select_backward.default", "sigmoid_backward.default"),
    *("silu_backward.default", "slice.Tensor", "slice_backward.default"),
    *("softplus_backward.default", "squeeze.default", "squeeze.dim", "squeeze.dims"),
    *("sum.dim_IntList", "t.default", "tanh_backward.default", "transpose.int"),
    *("unsqueeze.default", "view.default", "where.self", "_unsafe_view.default"),
)
"""Functions of a gradient by which a sum over samples is one of their results."""


def lower(
    module: nn.Module,
    input_shape: tuple[int, ...] | Inputs,
    places: Places,
    loss: LossOp | OwnLoss,
    backward: bool = True,
    input_type: torch.dtype = torch.float32,
    why_not: Callable[[Tensor], str | None] = lambda _: None,
) -> Program:
    """Return the program of a module that takes inputs [b, *input_shape], or several.

    They are floats, or tokens (int64); several are of any type. The module's modes
    decide what is recorded.
    `why_not` tells what has computed a constant whose bits are not portable.
    Raises NotPortable, which names every operation without a kernel, and
    NotReproducible if another call computes something else.
    """
    named = (*module.named_parameters(), *module.named_buffers())
    constant = [name for name, _ in named if name not in places]
    own = loss if isinstance(loss, OwnLoss) else None
    given = input_shape
    if not isinstance(given, Inputs):
        given = Inputs((Kind(given, input_type),))
    how = (given, backward, whole_calls, constant, own)
    try:
        trace = for_any_batch(lambda samples: record(module, samples, *how))
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise NotPortable(advice.REENTRANT) from None
    lowering = Lowering(trace, places, why_not=why_not)
    samples.load(lowering)
    _lower_nodes(lowering, trace.nodes[: trace.num_forward])
    positions = 1
    if isinstance(loss, OwnLoss):
        positions = samples.measure(lowering, backward)
    else:
        positions = _measure(lowering, loss, backward)
    last = lowering.ops[-1]
    _lower_nodes(lowering, trace.nodes[trace.num_forward :])
    if lowering.unknown:
        raise NotPortable(advice.refusal(lowering.unknown))
    first = lowering.ops[0]
    first.i[1] = lowering.by_sample.get(inputs(first.i[2]), NONE)
    ops = fusion.fuse(fusion.needed(lowering.ops), lowering.buffers)
    num_loads = len(trace.inputs) + (own is not None)
    return Program(
        tuple(ops),
        tuple(lowering.buffers),
        num_loads,
        next(n for n, op in enumerate(ops) if op is last) + 1 - num_loads,
        lowering.streams > 0,
        tuple(lowering.mask_dims),
        positions,
        torch.cat(lowering.constants) if lowering.constants else None,
        cells=len(trace.measured),
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
                mixes = lowering.gradient is None and samples.mixes(
                    lowering, node, arguments
                )
                op = f"{node.op}{advice.MIXES}" if mixes else node.op
                lowering.unknown.append((op, node.where))
            results = [Unknown()] * len(node.outputs)
        for value, result in zip(node.outputs, results, strict=True):
            lowering.known[value] = result
            if value in gradients:
                _write_gradient(lowering, gradients[value], result)


def _functions(op: str) -> list[Lowered]:
    """Return what may lower an operation; the first that does counts."""
    names = (op, _functional(op))
    every = [table.get(n) for table in TABLES for n in names]
    return list(dict.fromkeys(function for function in every if function))


def _results(
    lowering: Lowering, node: Node, arguments: list[Any], functions: list[Lowered]
) -> Results:
    arguments = materialise.masks(lowering, node, arguments)
    for function in functions:
        results = function(lowering, node, arguments)
        if results is not None:
            return results
    place = _place_of_sum(node, arguments)
    if place is not None:
        return _by_part(lowering, node, arguments, functions, place)
    given = list(map(lowering.given_for_ones, node.arguments, arguments))
    given = materialise.all_masks(lowering, node, given)
    changes: list[Callable[[Lowering, Any], Any]] = [materialise.parameters]
    # Bytes and their like wrap around, as floats do not.
    if not any(value.dtype in SMALL for value in node.outputs):
        changes.append(materialise.numbers)
    if not node.is_constant and not _changes_parameter(node, arguments):
        changes.append(partial(materialise.parameters, every=True))
    for change in changes:
        given = change(lowering, given)
        for function in functions if given != arguments else ():
            results = function(lowering, node, given)
            if results is not None:
                return results
    return None


def _changes_parameter(node: Node, arguments: list[Any]) -> bool:
    """Return whether an operation writes to a parameter or a buffer of the module."""
    return _functional(node.op) != node.op and isinstance(arguments[0], Parameter)


def _place_of_sum(node: Node, arguments: list[Any]) -> int | None:
    """Return which argument is a gradient that is a sum: the first one.

    Or one of two between which a constant chooses, if the other one is zero.
    """
    places = [
        n for n, a in enumerate(arguments) if isinstance(a, SampleSum | GradientSum)
    ]
    if places[:1] == [0]:
        return 0
    if node.op != "aten.where.self" or places not in ([1], [2]):
        return None
    mask, other = node.arguments[0].data, node.arguments[3 - places[0]].data
    is_linear = mask is not None and other is not None and not other.any()
    return places[0] if is_linear else None


def _by_part(
    lowering: Lowering,
    node: Node,
    arguments: list[Any],
    functions: list[Lowered],
    place: int,
) -> Results:
    """Lower a linear function of a gradient that is a sum, term by term."""
    if node.op.removeprefix("aten.") not in LINEAR:
        return None
    gradient = arguments[place]

    def lowered(part: Any) -> Results:
        parts = [*arguments[:place], part, *arguments[place + 1 :]]
        return _results(lowering, node, parts, functions)

    if isinstance(gradient, GradientSum):
        found = list(map(lowered, gradient.parts))
        if None in found:
            return None
        return [GradientSum(tuple(part for results in found for part in results or ()))]
    results = lowered(gradient.rows)
    match results:
        case [Activation(samples_dim=None) as rows]:
            return [SampleSum(rows)]
    return None


def _functional(op: str) -> str:
    """Return the operation that makes a new tensor instead of changing one."""
    name, _, overload = op.removeprefix("aten.").partition(".")
    return f"aten.{name.removesuffix('_')}.{overload}"


def _has_unknown(arguments: list[Any]) -> bool:
    return any(isinstance(a, Unknown) for a in _leaves(arguments))


def _leaves(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, list):
            yield from _leaves(argument)
        elif isinstance(argument, dict):
            yield from _leaves(argument.values())
        else:
            yield argument


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
    elif isinstance(result, JoinedGradients):
        for part in result.parts:
            _write_one(lowering, place, part)
            place += math.prod(part.shape)
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
