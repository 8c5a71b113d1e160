"""Lower a recording of ATen operations to a program of kernels.

`aten` has a function for each operation, `fusion` then joins neighbours.
"""

from typing import Any

from torch import nn

from samestep.errors import NotPortable
from samestep.kernels import fusion
from samestep.kernels.aten import LOWERINGS, advice
from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import (
    Activation,
    BiasGradient,
    LossOp,
    Lowering,
    Places,
    Unknown,
    WeightGradient,
)
from samestep.kernels.program import NONE, Op, Program
from samestep.kernels.trace import Node, record


def lower(
    module: nn.Module,
    input_shape: tuple[int, ...],
    places: Places,
    loss: LossOp,
    backward: bool = True,
) -> Program:
    """Return the program of a module that takes floats [b, *input_shape].

    The module's modes decide what is recorded. Raises NotPortable, which names every
    operation without a kernel.
    """
    trace = record(module, input_shape, backward)
    lowering = Lowering(trace, places)
    features = 1
    for size in input_shape:
        features *= size
    assert trace.inputs is not None
    lowering.known[trace.inputs] = lowering.activation(features)
    lowering.ops.append(Op(OpKind.LOAD, [0, NONE, features]))
    _lower_nodes(lowering, trace.nodes[: trace.num_forward])
    _measure(lowering, loss, backward)
    last = lowering.ops[-1]
    _lower_nodes(lowering, trace.nodes[trace.num_forward :])
    if lowering.unknown:
        raise NotPortable(advice.refusal(lowering.unknown))
    lowering.ops[0].i[1] = lowering.by_sample.get(0, NONE)
    ops = fusion.fuse(lowering.ops)
    num_forward = next(n for n, op in enumerate(ops) if op is last)
    return Program(
        tuple(ops), tuple(lowering.buffers), 1, num_forward, lowering.streams > 0
    )


def _lower_nodes(lowering: Lowering, nodes: list[Node]) -> None:
    gradients = {value: name for name, value in lowering.trace.gradients.items()}
    for node in nodes:
        arguments = [lowering.result_of(a) for a in node.arguments]
        function = LOWERINGS.get(node.op)
        follows = any(isinstance(a, Unknown) for a in arguments)  # what is listed
        results = None
        if function and not follows:
            results = function(lowering, node, arguments)
        if results is None:
            if not (function and follows):
                lowering.unknown.append((node.op, node.where))
            results = [Unknown()] * len(node.outputs)
        for value, result in zip(node.outputs, results, strict=True):
            lowering.known[value] = result
            if value in gradients:
                _write_gradient(lowering, gradients[value], result)


def _measure(lowering: Lowering, loss: LossOp, backward: bool) -> None:
    """Append the loss, which also begins the backward pass."""
    outputs = lowering.result_of(lowering.trace.outputs)
    if not isinstance(outputs, Activation):
        lowering.gradient = Unknown()
        return
    i, f = [outputs.buffer, outputs.features], list[float]()
    if loss.kind != OpKind.STORE:
        written = NONE
        if backward:
            lowering.gradient = gradient = lowering.activation(outputs.features)
            written = gradient.buffer
        i = [outputs.buffer, written, outputs.features]
    if loss.kind == OpKind.CROSS_ENTROPY:
        i, f = [*i, loss.ignored], [loss.smoothing]
    lowering.ops.append(Op(loss.kind, i, f))


def _write_gradient(lowering: Lowering, name: str, result: Any) -> None:
    """Append what writes the gradient of a parameter."""
    place = lowering.places.parameters[name]
    match result:
        case WeightGradient(gradient, inputs):
            copy = lowering.transposed(inputs)
            i = [gradient.buffer, copy, inputs.features, gradient.features, place]
            lowering.ops.append(Op(OpKind.LINEAR_GRAD_WEIGHT, i))
        case BiasGradient(gradient):
            i = [gradient.buffer, gradient.features, place]
            lowering.ops.append(Op(OpKind.GRAD_BIAS, i))
