"""The recipe: everything that determines the result of a training, and nothing else.

Precedence: command line > TOML file > the defaults below. A field that does not belong
to the chosen optimizer, schedule or model is an error, never ignored.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from samestep.config import portable
from samestep.config.data import PADDING, DataRecipe, MnistData, TextData
from samestep.config.explain import explain
from samestep.config.model import (
    Count,
    CrossEntropy,
    LossRecipe,
    MlpModel,
    ModelRecipe,
    Section,
)
from samestep.config.optimizer import OptimizerRecipe, Pattern
from samestep.config.renames import OLD_NAMES, rename
from samestep.config.schedule import ConstantLR, PlateauLR, ScheduleRecipe
from samestep.config.sections import override
from samestep.config.training import EarlyStoppingRecipe, EmaRecipe, InitRecipe
from samestep.errors import RecipeError, did_you_mean
from samestep.files import untrusted
from samestep.system.json_values import JsonObject


Precision = Literal["float32", "bf16", "float64"]
Arithmetic = Literal["torch", "portable"]
BUILT_IN = resources.files("samestep") / "recipes"
MOST_BYTES = 1 << 20
"""Size of a recipe file."""


class Recipe(Section):
    """Everything that determines the result: equal recipes give equal bits."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Used in paths: letters, digits, dots, dashes and underscores."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of samples, dropout and augmentation."""
    epochs: Count | None = None
    """Passes over the training samples; a recipe has these or `max_steps`."""
    max_steps: Count | None = None
    """Optimizer steps after which training ends, also in the middle of an epoch."""
    global_batch: Count
    """Samples of one optimizer step, at any number of workers."""
    micro_batches: Count
    """Micro-batches of a global batch; at most this many workers can share them."""
    evaluation_steps: Count | None = None
    """Optimizer steps between two evaluations on the validation samples, with one more
    at the end; by default they come at the end of each epoch."""
    evaluation_batch: Count = 250
    """Samples that are evaluated at once."""
    threads: Count = 1
    """Intra-op threads of each worker; another number gives other bits."""
    precision: Precision = "float32"
    """`float64`: of everything; `bf16`: of products, if the processor supports it."""
    arithmetic: Arithmetic = "torch"
    """`portable`: kernels of samestep's own, which give the same bits on every
    processor; `torch`: those of PyTorch, whose bits belong to a type of processor."""
    compile: bool = False
    """Use torch.compile in training; needs a C++ compiler and gives other bits."""
    compression: Literal["none", "bf16", "fp16"] = "none"
    """Round partial gradients to this type, to exchange half as many bytes."""
    data: DataRecipe = MnistData()
    model: ModelRecipe = MlpModel()
    loss: LossRecipe = CrossEntropy()
    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe = ConstantLR()
    init: InitRecipe | None = None
    """Start from given weights instead of random ones."""
    freeze: Annotated[tuple[Pattern, ...], Field(min_length=1)] | None = Field(
        None, strict=False
    )
    """Regular expressions, searched in the names: parameters that are not trained."""
    ema: EmaRecipe | None = None
    """Evaluate and save a moving average of the weights."""
    early_stopping: EarlyStoppingRecipe | None = None
    """End the training once the validation stops improving."""

    omit_if_default = frozenset({"arithmetic", "compile", "compression"})

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError(
                "`epochs` is missing: a training ends after `epochs`, or after "
                "`max_steps`"
            )
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                "a training ends after `epochs` or after `max_steps`; received "
                f"{self.epochs} and {self.max_steps}: leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _stopping_needs_validation(self) -> Self:
        has_none = getattr(self.data, "validation", None) == 0
        for name in self.watching_validation if has_none else ():
            raise ValueError(
                f"`{name}` is for validation samples, and `data.validation` is 0: hold "
                f"some out, or leave out `{name}`"
            )
        return self

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.ema and self.optimizer.name == "schedule-free-adamw":
            raise ValueError(
                "a schedule-free optimizer averages the weights itself: leave out "
                "`ema`, or use another `optimizer.name` than `schedule-free-adamw`"
            )
        return self

    @model_validator(mode="after")
    def _free_of_plateaus(self) -> Self:
        is_free = self.optimizer.name == "schedule-free-adamw"
        if is_free and isinstance(self.schedule, PlateauLR):
            raise ValueError(
                "a schedule-free optimizer weighs its steps by their learning rates, "
                "which evaluations must not decide: use another `schedule.name` than "
                "`plateau`, such as `constant`"
            )
        return self

    @model_validator(mode="after")
    def _portable_parts(self) -> Self:
        if self.is_portable:
            portable.check(self)
        return self

    @model_validator(mode="after")
    def _float64_is_not_rounded(self) -> Self:
        if self.precision == "float64" and self.compression != "none":
            raise ValueError(
                "`compression` rounds gradients to 16 bits, and `precision` `float64` "
                f"keeps all 64; `compression` is `{self.compression}`: leave out one "
                "of the two"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_have_samples(self) -> Self:
        if self.micro_batches > self.global_batch:
            raise ValueError(
                "a micro-batch holds at least one sample: "
                f"`micro_batches` is {self.micro_batches}, `global_batch` only "
                f"{self.global_batch}"
            )
        return self

    @model_validator(mode="after")
    def _padding_is_ignored(self) -> Self:
        is_padded = isinstance(self.data, TextData) and self.data.lines
        ignored = getattr(self.loss, "ignore_index", PADDING)
        if is_padded and ignored != PADDING:
            raise ValueError(
                f"with `data.lines`, targets behind the end of a line are {PADDING}, "
                f"and the loss ignores them with `loss.ignore_index = {PADDING}`; "
                f"received {ignored}"
            )
        return self

    @model_validator(mode="after")
    def _mixed_classes_have_their_loss(self) -> Self:
        augment = getattr(self.data, "augment", None)
        ignored = getattr(self.loss, "ignore_index", None)
        if augment and augment.mixup and ignored is not None:
            raise ValueError(
                "mixup mixes classes, and none of them is to be ignored: "
                f"`data.augment.mixup` is {augment.mixup}, `loss.ignore_index` "
                f"{ignored}"
            )
        if augment and augment.mixup and self.loss.name != "cross-entropy":
            raise ValueError(
                "mixup is for classes, with the loss `cross-entropy`: "
                f"`data.augment.mixup` is {augment.mixup}, `loss.name` "
                f"`{self.loss.name}`"
            )
        return self

    @property
    def watching_validation(self) -> list[str]:
        """The fields that need validation samples."""
        names = ["early_stopping", "evaluation_steps"]
        is_plateau = isinstance(self.schedule, PlateauLR)
        found = [name for name in names if getattr(self, name)]
        return found + (["schedule.metric"] if is_plateau else [])

    @property
    def is_portable(self) -> bool:
        """Whether every processor gives the same bits."""
        return self.arithmetic == "portable"

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the whole training."""
        return self.max_steps or (self.epochs or 0) * steps_per_epoch

    def to_dict(self) -> JsonObject:
        """Return the fields as JSON values; those that are not set are left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        """Return all fields as TOML, of which `load` makes an equal recipe."""
        return tomli_w.dumps(self.to_dict())

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON text of all fields but the name.

        Renamed fields count under their old names: no rename changes a digest.
        """
        fields = rename(self.to_dict(), OLD_NAMES)
        del fields["name"]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def changed(self, overrides: Mapping[str, Any]) -> "Recipe":
        """Return a recipe with other values for some fields, by dotted name.

        A section of another kind, as by `optimizer.name`, keeps the values that
        were set, of fields that mean the same in both kinds. Raises RecipeError.
        """
        overrides = rename(overrides, warn=True)
        return Recipe.from_dict(override(self.to_dict(), overrides))

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], origin: str = "recipe", *, warn: bool = True
    ) -> "Recipe":
        """Return the recipe with these fields, as `to_dict` gives them.

        Old names of fields are accepted, with a warning if `warn`. Raises RecipeError,
        which names every wrong field.
        """
        if not isinstance(fields, Mapping):
            raise RecipeError(
                f"{origin} is a table of fields; received a list or a value."
            )
        fields = rename(fields, warn=warn)
        try:
            untrusted.check_depth(fields)
            return cls.model_validate(fields)
        except ValidationError as error:
            raise RecipeError(explain(error, origin, cls.model_fields)) from None
        except ValueError as error:
            raise RecipeError(f"{origin} cannot be used: {error}.") from None

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        overrides: Mapping[str, Any] | None = None,
        *,
        warn: bool = True,
    ) -> "Recipe":
        """Read a built-in recipe or a TOML file, then override fields by dotted name.

        Old names of fields are accepted, with a warning if `warn`. Raises RecipeError.
        """
        text, origin = _read(name_or_path)
        try:
            fields = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{origin} is not valid TOML: {error}.") from None
        fields.setdefault("name", Path(name_or_path).stem)
        fields = rename(fields, warn=warn)
        overrides = rename(overrides or {}, warn=warn)
        return cls.from_dict(override(fields, overrides), origin)


def built_in_recipes() -> list[str]:
    """Return the names of the recipes in the package, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in BUILT_IN.iterdir()
        if entry.name.endswith(".toml")
    )


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value`; the value is TOML, or a string if it is not valid TOML.

    Raises RecipeError.
    """
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(
            f"An override is `field=value`; received `{text}`. "
            "Example: `--set optimizer.lr=0.002`."
        )
    try:
        return dotted.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return dotted.strip(), value.strip()


def _read(name_or_path: str | Path) -> tuple[str, str]:
    path = Path(name_or_path)
    if str(name_or_path) in built_in_recipes():
        return (BUILT_IN / f"{name_or_path}.toml").read_text(), f"Recipe {name_or_path}"
    try:
        return untrusted.read_text(path, most=MOST_BYTES), f"Recipe {path}"
    except (OSError, UnicodeDecodeError) as error:
        if path.suffix != ".toml" and not path.exists():
            known = built_in_recipes()
            raise RecipeError(
                f"No built-in recipe is called `{name_or_path}`."
                f"{did_you_mean(str(name_or_path), known)} There are: "
                f"{', '.join(known)}; or give the path of a TOML file."
            ) from None
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RecipeError(f"Recipe {path} cannot be read: {reason}.") from None
