"""What the tensors of a recording stand for, once it is lowered to a program."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from samestep.kernels.interface import OpKind
from samestep.kernels.program import NONE, Op
from samestep.kernels.tensors import Axis, Strided


@dataclass(frozen=True)
class Activation(Strided):
    """Activations: a tensor with samples, in a buffer by feature of `rows` rows."""

    buffer: int
    rows: int

    @property
    def is_whole(self) -> bool:
        """Whether it has the whole buffer, its rows in their order."""
        return self.size == self.rows and self.axes in ([], [Axis(self.rows, 1)])


@dataclass(frozen=True)
class Integers(Strided):
    """Integers of samples, such as tokens, in a buffer by feature of `rows` rows."""

    buffer: int
    rows: int


@dataclass(frozen=True)
class Parameter(Strided):
    """A parameter, or a buffer of the module; strides and offset are in elements."""

    name: str


@dataclass(frozen=True)
class Constant(Parameter):
    """A parameter that is frozen, or what the module makes without its inputs."""

    data: Tensor = field(compare=False)
    """All of it; the strides and the offset are a view."""


@dataclass(frozen=True)
class Mask:
    """The factors of a dropout: zeros, and 1 / (1 - probability)."""

    stream: int
    probability: float
    is_scaled: bool = True
    """Whether they are that already, or ones instead of 1 / (1 - probability)."""


@dataclass(frozen=True)
class Ones:
    """A constant of ones, or room for a mask."""


@dataclass(frozen=True)
class Zeros:
    """A constant of zeros."""


@dataclass(frozen=True)
class WeightGradient:
    """The product of a gradient's and an input's activations, [out, in].

    Or a view of it with other dimensions of size 1.
    """

    gradient: Activation
    """[samples (and positions), out]."""
    inputs: Activation

    @property
    def shape(self) -> tuple[int, int]:
        """Its sizes, [out, in]."""
        return self.gradient.shape[-1], self.inputs.shape[-1]

    @property
    def transposed(self) -> "WeightGradient":
        """The same product as [in, out]."""
        return WeightGradient(self.inputs, self.gradient)


@dataclass(frozen=True)
class TableGradient:
    """The gradient of a table whose rows stand for tokens."""

    gradient: Activation
    """[..., width], of the rows that were taken."""
    tokens: Integers
    vocabulary: int
    padding: int
    """A token whose row has no gradient, or NONE."""


@dataclass(frozen=True)
class SampleSum:
    """The sum of activations over the samples."""

    rows: Activation
    """What is summed; its dimensions are those of the sum, without the samples."""
    divisions: int = 0
    """How often it was divided by the number of samples, less how often multiplied."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its dimensions."""
        return self.rows.shape


@dataclass(frozen=True)
class GradientSum:
    """The gradient of a parameter that is used several times."""

    parts: tuple[Any, ...]
    """The gradient of each use, in the order of the backward pass."""


@dataclass(frozen=True)
class JoinedGradients:
    """The gradient of a parameter whose parts along its first dimension are used."""

    parts: tuple[WeightGradient | SampleSum, ...]


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
class Written:
    """The gradient of a parameter, which an operation writes."""

    op: Op
    number: int
    """Which of its numbers is the gradient's place in a slot; NONE: nowhere."""


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
    counters: Collection[str] = ()
    """Integers that count passes."""

    def __contains__(self, name: str) -> bool:
        """Return whether training changes the tensor of that name."""
        return any(
            name in part for part in (self.parameters, self.buffers, self.counters)
        )


@dataclass(frozen=True)
class LossOp:
    """How a program measures its outputs."""

    kind: OpKind
    """CROSS_ENTROPY, SQUARED_ERROR, or STORE: no loss."""
    smoothing: float = 0.0
    ignored: int = NONE
