"""What the tensors of a recording become when it is lowered to a program."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from samestep.kernels.interface import OpKind
from samestep.kernels.program import NONE, Buffer, Op
from samestep.kernels.trace import Node, Trace, Value


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
    gradient: Activation | Unknown | None = None
    """That of the outputs."""
    unknown: list[tuple[str, str]] = field(default_factory=list)
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


Results = list[Any] | None
"""What the outputs of an operation became; None: there is no kernel."""

Lowerings = Mapping[str, Callable[[Lowering, Node, list[Any]], Results]]
"""The functions that lower ATen operations, by their names."""
