"""Lower a recording of ATen operations to a program of kernels.

Each operation has a function here, by its name in LOWERINGS. It takes what its
arguments became, and appends operations or says what its result stands for: much of a
recording is views, which need no operation. `fusion` then joins neighbours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from samestep.errors import NotPortable
from samestep.kernels import fusion
from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.program import NO_FLAGS, NONE, Buffer, Op, Program
from samestep.kernels.trace import Node, Trace, Value, record


@dataclass(frozen=True)
class Activation:
    """Activations [samples, features] in a buffer by feature."""

    buffer: int
    features: int
    is_transposed: bool = False


@dataclass(frozen=True)
class Parameter:
    """A parameter, or a buffer of the module."""

    name: str
    is_transposed: bool = False


@dataclass(frozen=True)
class Mask:
    """The factors of a dropout: zeros, and 1 / (1 - probability)."""

    stream: int
    probability: float


@dataclass(frozen=True)
class Ones:
    """A constant of ones, or room for a mask."""


@dataclass(frozen=True)
class WeightGradient:
    """The product of a gradient's and an input's activations, [out, in]."""

    gradient: Activation
    inputs: Activation


@dataclass(frozen=True)
class BiasGradient:
    """The sum of a gradient's activations over the samples, [features]."""

    gradient: Activation


@dataclass(frozen=True)
class Normalised:
    """What batch norm keeps for its backward pass."""

    buffer: int
    inverse: int
    eps: float


@dataclass(frozen=True)
class NormGradient:
    """The gradient of a batch norm's weight or bias, which its operation writes."""


@dataclass(frozen=True)
class Opaque:
    """A tensor that no kernel can take."""


@dataclass(frozen=True)
class Unknown:
    """What follows from an operation without a kernel."""


@dataclass(frozen=True)
class Places:
    """Where the parameters and buffers of a module lie in the flat vectors."""

    parameters: Mapping[str, int]
    buffers: Mapping[str, int]


@dataclass(frozen=True)
class LossOp:
    """How a program measures its outputs."""

    kind: OpKind
    """CROSS_ENTROPY, SQUARED_ERROR, or STORE: no loss."""
    smoothing: float = 0.0
    ignored: int = NONE


@dataclass
class Lowering:
    """What has been lowered so far."""

    trace: Trace
    places: Places
    ops: list[Op] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    known: dict[Value, Any] = field(default_factory=dict)
    streams: int = 0
    gradient: Activation | None = None
    """That of the outputs."""
    unknown: list[str] = field(default_factory=list)
    """Operations without a kernel, and who called them."""
    by_sample: dict[int, int] = field(default_factory=dict)
    """The transposed copies of buffers."""

    def activation(self, features: int) -> Activation:
        """Return a new buffer by feature."""
        self.buffers.append(Buffer(features))
        return Activation(len(self.buffers) - 1, features)

    def result_of(self, value: Any) -> Any:
        """Return what an argument became; numbers are themselves."""
        if not isinstance(value, Value):
            return value
        if value.name == "gradient":
            return self.gradient
        if value.name and value not in self.known:
            self.known[value] = Parameter(value.name)
        return self.known.get(value, Opaque())

    def transposed(self, source: Activation) -> int:
        """Return a copy of activations by sample; made once."""
        if source.buffer not in self.by_sample:
            self.buffers.append(Buffer(source.features, is_by_sample=True))
            copy = self.by_sample[source.buffer] = len(self.buffers) - 1
            if source.buffer:  # buffer 0 are the inputs, which are loaded both ways
                i = [source.buffer, copy, source.features]
                self.ops.append(Op(OpKind.TRANSPOSE, i))
        return self.by_sample[source.buffer]


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


Results = list[Any] | None
"""What the outputs of an operation became; None: there is no kernel."""


def _same(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [arguments[0]]


def _opaque(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [Opaque()] * len(node.outputs)


def _view(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments[0], node.outputs[0].shape:
        case Activation(_, features, False), (lowering.trace.samples, n) if (
            n == features
        ):
            return [arguments[0]]
        case ((BiasGradient() as gradient), (n,)) if n == gradient.gradient.features:
            return [gradient]
    return None


def _transpose(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments[0]:
        case Activation() | Parameter() as matrix:
            return [replace(matrix, is_transposed=not matrix.is_transposed)]
        case WeightGradient(gradient, inputs):
            return [WeightGradient(inputs, gradient)]
    return None


def _addmm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [
            Parameter(bias),
            Activation(is_transposed=False) as x,
            Parameter(name, True),
        ]:
            return [_linear(lowering, node, x, name, lowering.places.parameters[bias])]
    return None


def _mm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as x, Parameter(name, True)]:
            return [_linear(lowering, node, x, name, NONE)]
        case [Activation(is_transposed=False) as x, Parameter(name, False)]:
            # Also the forward pass of a weight that is kept as [in, out].
            y = lowering.activation(node.outputs[0].shape[1])
            place = lowering.places.parameters[name]
            i = [x.buffer, y.buffer, y.features, x.features, place, NONE]
            lowering.ops.append(Op(OpKind.LINEAR_GRAD_INPUT, i, [1.0]))
            return [y]
        case [
            Activation(is_transposed=True) as x,
            Activation(is_transposed=False) as y,
        ]:
            return [WeightGradient(replace(x, is_transposed=False), y)]
    return None


def _linear(
    lowering: Lowering, node: Node, x: Activation, weight: str, bias: int
) -> Activation:
    y = lowering.activation(node.outputs[0].shape[1])
    place = lowering.places.parameters[weight]
    i = [x.buffer, y.buffer, x.features, y.features, place, bias, 0]
    lowering.ops.append(Op(OpKind.LINEAR, i, [0.0]))
    return y


def _relu(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as x]:
            return [_activate(lowering, x, OpFlag.RELU, Mask(0, 0.0))]
    return None


def _activate(
    lowering: Lowering, x: Activation, flags: OpFlag, mask: Mask
) -> Activation:
    y = lowering.activation(x.features)
    i = [x.buffer, y.buffer, x.features, mask.stream]
    lowering.ops.append(Op(OpKind.ACTIVATE, i, [mask.probability], flags))
    return y


def _ones(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [Ones()]


def _bernoulli(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    lowering.streams += 1
    return [Mask(lowering.streams - 1, 1 - arguments[1])]


def _div(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Mask(probability=p) as mask, kept] if p == 1 - kept:
            return [mask]
    return None


def _mul(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as x, Mask() as mask]:
            return [_activate(lowering, x, OpFlag.DROPOUT, mask)]
        case [Ones(), Mask() as mask]:
            return [mask]
    return None


def _threshold_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [Activation() as dy, Activation() as y, 0]:
            dx = lowering.activation(dy.features)
            i = [dy.buffer, dx.buffer, y.buffer, dy.features]
            lowering.ops.append(Op(OpKind.GATE, i, [1.0]))
            return [dx]
    return None


def _sum(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as dy, [0], *_]:
            return [BiasGradient(dy)]
    return None


def _batch_norm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [
            Activation(is_transposed=False) as x,
            Parameter(weight),
            Parameter(bias),
            Parameter(mean),
            Parameter(variance),
            bool(training),
            float(momentum),
            float(eps),
        ]:
            y, z = lowering.activation(x.features), lowering.activation(x.features)
            lowering.buffers.append(Buffer(x.features, is_by_micro_batch=True))
            saved = Normalised(z.buffer, len(lowering.buffers) - 1, eps)
            parameters, buffers = lowering.places.parameters, lowering.places.buffers
            vectors = [parameters[weight], parameters[bias]]
            running = [buffers[mean], buffers[variance]]
            i = [x.buffer, y.buffer, saved.buffer, saved.inverse, x.features]
            i += [*vectors, *running, *running, 0]
            op = Op(OpKind.BATCH_NORM, i, [eps, momentum, 0.0])
            op.flags = NO_FLAGS if training else OpFlag.EVAL
            lowering.ops.append(op)
            return [y, saved, saved]
    return None


def _batch_norm_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [
            Activation() as dy,
            _,
            Parameter(weight),
            _,
            _,
            Normalised() as saved,
            *_,
        ]:
            dx = lowering.activation(dy.features)
            gradients = {v: n for n, v in lowering.trace.gradients.items()}
            places = lowering.places.parameters
            written = [
                places[gradients[value]] if value in gradients else NONE
                for value in node.outputs[1:]
            ]
            i = [dy.buffer, dx.buffer, NONE, saved.buffer, saved.inverse, dy.features]
            i += [places[weight], *written]
            lowering.ops.append(Op(OpKind.BATCH_NORM_GRAD, i, [1.0]))
            return [dx, NormGradient(), NormGradient()]
    return None


LOWERINGS: Mapping[str, Callable[[Lowering, Node, list[Any]], Results]] = {
    "aten._unsafe_view.default": _view,
    "aten.add_.Tensor": _opaque,
    "aten.addmm.default": _addmm,
    "aten.bernoulli_.float": _bernoulli,
    "aten.detach.default": _same,
    "aten.div_.Scalar": _div,
    "aten.empty.memory_format": _opaque,
    "aten.empty_like.default": _ones,
    "aten.mm.default": _mm,
    "aten.mul.Tensor": _mul,
    "aten.native_batch_norm.default": _batch_norm,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
    "aten.ones.default": _ones,
    "aten.ones_like.default": _ones,
    "aten.relu.default": _relu,
    "aten.sum.dim_IntList": _sum,
    "aten.t.default": _transpose,
    "aten.threshold_backward.default": _threshold_backward,
    "aten.view.default": _view,
}
