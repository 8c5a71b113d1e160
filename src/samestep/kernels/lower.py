"""Lower a recording of ATen operations to a program of kernels.

`aten` has a function for each operation, `fusion` then joins neighbours.
"""

from typing import Any

from torch import nn

from samestep.errors import NotPortable
from samestep.kernels import fusion
from samestep.kernels.aten import LOWERINGS
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
        raise NotPortable(
            "Portable arithmetic has no kernels for these operations: "
            f"{'; '.join(dict.fromkeys(lowering.unknown))}. Use others, or set "
            '`arithmetic = "torch"`.'
        )
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
        if any(isinstance(a, Unknown) for a in arguments):  # listed already
            lowering.known |= dict.fromkeys(node.outputs, Unknown())
            continue
        function = LOWERINGS.get(node.op)
        results = function(lowering, node, arguments) if function else None
        if results is None:
            lowering.unknown.append(f"`{node.op}` ({node.where})")
            results = [Unknown()] * len(node.outputs)
        for value, result in zip(node.outputs, results, strict=True):
            lowering.known[value] = result
            if value in gradients:
                _write_gradient(lowering, gradients[value], result)


def _measure(lowering: Lowering, loss: LossOp, backward: bool) -> None:
    """Append the loss, which also begins the backward pass."""
    outputs = lowering.result_of(lowering.trace.outputs)
    if not isinstance(outputs, Activation):
        return
    i, f = [outputs.buffer, outputs.features], list[float]()
    if loss.kind != OpKind.STORE:
        if backward:
            lowering.gradient = lowering.activation(outputs.features)
        gradient = lowering.gradient.buffer if lowering.gradient else NONE
        i = [outputs.buffer, gradient, outputs.features]
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
