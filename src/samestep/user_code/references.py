"""References of a recipe to user code, and how a worker resolves them; no torch.

A reference is `module:function`, or `sha256:...` for an object that a Python caller has
given.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from samestep.config.data import CustomData
from samestep.config.model import CustomLoss, CustomModel
from samestep.config.optimizer import CustomOptimizer
from samestep.config.recipe import Recipe
from samestep.config.schedule import CustomLR
from samestep.errors import OwnCodeError, UsageError, did_you_mean
from samestep.files.cache import sha256_of
from samestep.user_code import imports


GIVEN = "sha256:"
"""Begins the name of an object that a Python caller has given."""


@dataclass(frozen=True)
class Given:
    """Objects that a Python caller has given, packed for the workers."""

    extents: dict[str, list[list[int]]] = field(default_factory=dict)
    """The first byte and the length of the parts of each object."""
    memories: Mapping[str, int] = field(default_factory=dict)
    """Descriptors that workers inherit."""


NOTHING = Given()


def names(recipe: Recipe) -> dict[str, str]:
    """Return the references for `model`, `data` and `loss` that are user code.

    These take part in every pass.
    """
    references = {}
    if isinstance(recipe.model, CustomModel):
        references["model"] = recipe.model.build
    if isinstance(recipe.data, CustomData):
        references["data"] = recipe.data.load
    if isinstance(recipe.loss, CustomLoss):
        references["loss"] = recipe.loss.function
    return references


def all_names(recipe: Recipe) -> dict[str, str]:
    """Return these, and those for `optimizer` and `schedule`."""
    references = names(recipe)
    if isinstance(recipe.optimizer, CustomOptimizer):
        references["optimizer"] = recipe.optimizer.build
    if isinstance(recipe.schedule, CustomLR):
        references["schedule"] = recipe.schedule.function
    return references


def checksums(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of each module's file; a run is resumed only with the same.

    Raises UsageError where there is no such module.
    """
    return {
        f"file of {name}": sha256_of(imports.file_of(name, role(part)))
        for part, name in all_names(recipe).items()
        if not name.startswith(GIVEN)
    }


def role(part: str) -> str:
    """Return what messages call a part, such as `build function`."""
    verbs = {"model": "build", "data": "load", "optimizer": "build"}
    return f"{verbs.get(part, part)} function"


def check_trusted(recipe: Recipe, named: Mapping[str, str], only: str = "") -> None:
    """Raise unless the code that a recipe names exists and may be run.

    `named` are the references that the caller has typed, and those to objects of the
    caller; `only` is the one part to check. References that only a file contains must
    be to files below the current directory: a recipe or a model file from elsewhere
    could otherwise call any function of any library. Raises OwnCodeError, UsageError.
    """
    for part, name in all_names(recipe).items():
        if only not in ("", part):
            continue
        if name.startswith(GIVEN):
            if name not in named.values():
                raise OwnCodeError(
                    f"The {part} of this recipe is an object that was given in Python "
                    f"({name[: len(GIVEN) + 12]}...), and such objects are never "
                    f"stored. Give it again: `{part}=...`."
                )
            continue
        file = imports.file_of(name, role(part))
        if named.get(part) != name and not imports.is_near(file):
            raise OwnCodeError(
                "Code that only a file names must be below the current directory, and "
                f"`{name}` is in {file}. If you trust it, name it yourself: "
                f"`--{part} {name}`."
            )


def check_callbacks(references: Iterable[str]) -> None:
    """Raise UsageError unless the modules of callbacks exist."""
    for name in references:
        if not name.startswith(GIVEN):
            imports.file_of(name, role("callback"))


@dataclass(frozen=True)
class UserCode:
    """Resolves references in a worker."""

    places: Sequence[str] = ()
    """Directories of modules besides those of the worker's own path."""
    given: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """By name, what returns the objects that a Python caller has given."""

    def find(self, name: str, part: str) -> Any:
        """Return the function or object. Raises UsageError."""
        with imports.on_path(self.places):
            if not name.startswith(GIVEN):
                return imports.load(name, role(part))
            if name not in self.given:
                raise OwnCodeError(f"The {part} {name} did not reach the worker.")
            with blaming(title(name, part)):
                return self.given[name]()

    def call(
        self,
        name: str,
        part: str,
        offered: Mapping[str, Any],
        arguments: Mapping[str, Any],
        *given: Any,
    ) -> Any:
        """Call the function with `arguments`, and those of `offered` that it takes.

        `given` are positional arguments, before them.

        Raises OwnCodeError, also for an exception of the function.
        """
        function = self.find(name, part)
        taken = _bind(function, title(name, part), offered, arguments, given)
        with imports.on_path(self.places), blaming(title(name, part)):
            return function(*given, **taken)


def find_loss(recipe: Recipe, user_code: UserCode) -> Callable[..., Any] | None:
    """Return the loss function if it is user code. Raises UsageError."""
    if not isinstance(recipe.loss, CustomLoss):
        return None
    loss: Callable[..., Any] = user_code.find(recipe.loss.function, "loss")
    return loss


def title(name: str, part: str) -> str:
    """Return what messages call a reference: `mine:build`, or `model=...`."""
    return f"`{name}`" if not name.startswith(GIVEN) else f"`{part}=...`"


@contextlib.contextmanager
def blaming(who: str) -> Iterator[None]:
    """Turn exceptions inside into OwnCodeError, with the name of the user code."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        raise OwnCodeError(f"{capital(who)} failed: {text}.") from error


def _bind(
    function: Callable[..., Any],
    who: str,
    offered: Mapping[str, Any],
    arguments: Mapping[str, Any],
    given: Sequence[Any],
) -> dict[str, Any]:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a library in C
        return dict(arguments)
    parameters = signature.parameters.values()
    known = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in arguments:
        if name not in known and not takes_all:
            raise OwnCodeError(
                f"{capital(who)} takes no argument `{name}`."
                f"{did_you_mean(name, known)} It takes: {', '.join(known) or 'none'}."
            )
    chosen = {k: v for k, v in offered.items() if takes_all or k in known}
    taken = {**chosen, **arguments}
    try:
        signature.bind(*given, **taken)
    except TypeError as error:
        raise OwnCodeError(
            f"{capital(who)} cannot be called: {error}. It is offered "
            f"{', '.join(map('`{}`'.format, offered)) or 'nothing'}; give the rest as "
            "`arguments` of its section."
        ) from None
    return taken


def capital(text: str) -> str:
    """Return the text with a capital letter, to begin a sentence."""
    return text[0].upper() + text[1:]
