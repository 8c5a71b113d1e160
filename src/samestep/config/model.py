"""The sections `[model]` and `[loss]` of a recipe, and what all sections share.

A field that does not belong to the chosen kind of section is an error, never ignored.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from samestep.system.json_values import JsonObject


Count = Annotated[int, Field(ge=1, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Dotted = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
"""User code: `module:function`."""
Arguments = dict[str, JsonValue]
Measured = Literal[
    "validation_loss", "validation_accuracy", "validation_absolute_error"
]
"""What an evaluation measures: an accuracy should rise, the others fall."""


def default_kind(tag: str, kind: str) -> BeforeValidator:
    """Return a validator that makes a section without its `tag` one of this kind."""
    return BeforeValidator(
        lambda section: {tag: kind} | section if isinstance(section, dict) else section
    )


class Section(BaseModel):
    """Immutable, without unknown fields and without silent conversions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    omit_if_default: ClassVar[frozenset[str]] = frozenset()
    """Later fields, left out where they have their defaults: so older recipes keep
    their digests."""

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> JsonObject:
        fields: JsonObject = handler(self)
        known = type(self).model_fields
        for name in self.omit_if_default & fields.keys():
            if getattr(self, name) == known[name].default:
                del fields[name]
        return fields


class CustomModel(Section):
    """Your own network, which a function returns; see docs/own-code.md."""

    family: Literal["custom"] = "custom"
    build: Dotted
    """`module:function`; or `sha256:...` for an object given in Python."""
    arguments: Arguments = {}
    """Keyword arguments for the function."""


class CustomLoss(Section):
    """Your own loss: a function of outputs and targets."""

    name: Literal["custom"] = "custom"
    function: Dotted
    """`module:function`; or `sha256:...` for an object given in Python."""


class MlpModel(Section):
    """Fully connected layers with ReLU and dropout between them."""

    family: Literal["mlp"] = "mlp"
    hidden: tuple[Count, ...] = Field((512, 256, 128), strict=False)
    """Widths of the hidden layers."""
    dropout: Fraction = 0.0
    """Probability that a hidden activation is dropped in training."""
    norm: Literal["none", "batch"] = "none"
    """Normalisation of the hidden layers before their ReLU."""


class CnnModel(Section):
    """Convolutions with pooling, then fully connected layers."""

    family: Literal["cnn"] = "cnn"
    channels: tuple[Count, ...] = Field((24, 32), strict=False, min_length=1)
    """Output channels of each convolution; a 2 x 2 max-pooling follows each."""
    kernels: tuple[Count, ...] = Field((5, 3), strict=False)
    """Kernel size of each convolution."""
    hidden: tuple[Count, ...] = Field((256,), strict=False)
    """Widths of the fully connected hidden layers."""
    dropout: Fraction = 0.0
    """Probability that an activation of these layers is dropped in training."""
    norm: Literal["none", "batch"] = "none"
    """Normalisation after each pooling."""

    @model_validator(mode="after")
    def _one_kernel_for_each_convolution(self) -> Self:
        if len(self.kernels) != len(self.channels):
            raise ValueError(
                "each convolution has one kernel size: `model.kernels` has "
                f"{len(self.kernels)}, `model.channels` {len(self.channels)}"
            )
        return self


class ResnetModel(Section):
    """Residual blocks of convolutions with batch norm."""

    family: Literal["resnet"] = "resnet"
    channels: tuple[Count, ...] = Field((16, 32, 64), strict=False, min_length=1)
    """Channels of each stage; every stage but the first halves height and width."""
    blocks: Count = 1
    """Blocks of each stage, of two convolutions each."""


class RnnModel(Section):
    """A recurrent network over the rows of an image, or over tokens."""

    family: Literal["rnn"] = "rnn"
    cell: Literal["lstm", "gru"] = "lstm"
    """LSTM (Hochreiter and Schmidhuber 1997) or GRU (Cho et al. 2014)."""
    hidden: Count = 128
    """Width of the state."""
    layers: Count = 1
    """Recurrent layers, stacked."""


def _heads_share_the_width(model: Any) -> Any:
    if model.width % model.heads:
        raise ValueError(
            "attention heads share the width evenly: `model.width` is "
            f"{model.width}, `model.heads` {model.heads}"
        )
    return model


class VitModel(Section):
    """A transformer over the patches of an image."""

    family: Literal["vit"] = "vit"
    patch: Count = 7
    """Side of a square patch; pixels that fill no patch are ignored."""
    width: Count = 64
    """Size of a token's embedding."""
    depth: Count = 4
    """Number of transformer blocks."""
    heads: Count = 4
    """Attention heads, which share the width."""
    dropout: Fraction = 0.0
    """Dropout probability before each residual connection."""

    _heads = model_validator(mode="after")(_heads_share_the_width)


class TransformerModel(Section):
    """A decoder-only transformer, with causal attention."""

    family: Literal["transformer"] = "transformer"
    width: Count = 128
    """Size of a token's embedding."""
    depth: Count = 3
    """Number of transformer blocks."""
    heads: Count = 4
    """Attention heads, which share the width."""
    dropout: Fraction = 0.0
    """Dropout probability before each residual connection."""

    _heads = model_validator(mode="after")(_heads_share_the_width)


class CrossEntropy(Section):
    """Cross-entropy of classes, or of the next token."""

    name: Literal["cross-entropy"] = "cross-entropy"
    label_smoothing: Fraction = 0.0
    """Share of the target that is spread evenly over all classes."""
    ignore_index: int | None = None
    """Targets with this value, such as -100 for padding, count neither in the loss nor
    in the number that it is divided by."""


class SquaredError(Section):
    """Half the squared distance to the target, summed over its values."""

    name: Literal["squared-error"] = "squared-error"


ModelRecipe = Annotated[
    MlpModel
    | CnnModel
    | ResnetModel
    | RnnModel
    | VitModel
    | TransformerModel
    | CustomModel,
    Field(discriminator="family"),
    default_kind("family", "mlp"),
]
LossRecipe = Annotated[
    CrossEntropy | SquaredError | CustomLoss,
    Field(discriminator="name"),
    default_kind("name", "cross-entropy"),
]
