"""What a recipe names of the user's own, and where a worker gets it; without torch.

A name is `module:function`, or `sha256:...` for an object that a Python caller gave.
"""

import contextlib
import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from samestep.config.data import CustomData
from samestep.config.model import CustomLoss, CustomModel
from samestep.config.recipe import Recipe
from samestep.errors import OwnCodeError, UsageError, did_you_mean
from samestep.user_code import imports


GIVEN = "sha256:"
"""So begins the name that a recipe has for an object of a Python caller."""


@dataclass(frozen=True)
class Given:
    """Objects that a Python caller gave, where workers find them."""

    extents: dict[str, list[list[int]]] = field(default_factory=dict)
    """The first byte and the length of the parts of each object."""
    memories: Mapping[str, int] = field(default_factory=dict)
    """Descriptors that workers inherit."""


NOTHING = Given()


def names(recipe: Recipe) -> dict[str, str]:
    """`model`, `data` and `loss`, as far as they are the user's own."""
    found = {}
    if isinstance(recipe.model, CustomModel):
        found["model"] = recipe.model.build
    if isinstance(recipe.data, CustomData):
        found["data"] = recipe.data.load
    if isinstance(recipe.loss, CustomLoss):
        found["loss"] = recipe.loss.function
    return found


def checksums(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each module's file, for the conditions under which a run goes on.

    Raises UsageError where there is no such module.
    """
    return {
        f"file of {name}": imports.checksum_of(name, role(part))
        for part, name in names(recipe).items()
        if not name.startswith(GIVEN)
    }


def role(part: str) -> str:
    """`model function`: how messages call it."""
    return {"model": "build", "data": "load", "loss": "loss"}[part] + " function"


def check_origin(
    parts: Mapping[str, str], named: Mapping[str, str], given: Container[str]
) -> None:
    """Before anything runs: may this code be called, and is it there?

    `parts` are names in a recipe, `named` those that the caller has said; what only a
    file says must be the user's own files: a recipe or a model file from elsewhere
    could otherwise call any function of any library. Raises OwnCodeError, UsageError.
    """
    for part, name in parts.items():
        if name.startswith(GIVEN):
            if name not in given:
                raise OwnCodeError(
                    f"The {part} of this recipe is an object that was given in Python "
                    f"({name[: len(GIVEN) + 12]}...), and such objects are never "
                    f"stored. Give it again: `{part}=...`."
                )
            continue
        file = imports.source_of(name, role(part))
        if named.get(part) != name and not imports.is_near(file):
            raise OwnCodeError(
                "Code that only a file names must be below the current directory, and "
                f"`{name}` is in {file}. If you trust it, name it yourself: "
                f"`--{part} {name}`."
            )


class Lookup(Protocol):
    """Objects by name."""

    def __contains__(self, name: object, /) -> bool: ...

    def __getitem__(self, name: str, /) -> Any: ...


@dataclass(frozen=True)
class UserCode:
    """In a worker: the functions and objects that a recipe names."""

    places: Sequence[str] = ()
    """Where modules are looked for besides the worker's own path."""
    given: Lookup = field(default_factory=dict[str, Any])

    def find(self, name: str, part: str) -> Any:
        """The function or object. Raises UsageError."""
        with imports.on_path(self.places):
            if not name.startswith(GIVEN):
                return imports.load(name, role(part))
            if name not in self.given:
                raise OwnCodeError(f"The {part} {name} did not reach the worker.")
            with blaming(title(name, part)):
                return self.given[name]

    def call(
        self,
        name: str,
        part: str,
        offered: Mapping[str, Any],
        arguments: Mapping[str, Any],
    ) -> Any:
        """What the function returns for its arguments and what it takes of `offered`.

        Raises OwnCodeError, also for an exception of the function's.
        """
        function = self.find(name, part)
        taken = _bind(function, title(name, part), offered, arguments)
        with imports.on_path(self.places), blaming(title(name, part)):
            return function(**taken)


def find_loss(recipe: Recipe, own: UserCode) -> Callable[..., Any] | None:
    """The loss function if it is the user's own. Raises UsageError."""
    if not isinstance(recipe.loss, CustomLoss):
        return None
    found: Callable[..., Any] = own.find(recipe.loss.function, "loss")
    return found


def title(name: str, part: str) -> str:
    """How a message names it: `mine:build`, or `model=...`."""
    return f"`{name}`" if not name.startswith(GIVEN) else f"`{part}=...`"


@contextlib.contextmanager
def blaming(who: str) -> Iterator[None]:
    """Exceptions inside are the user's: OwnCodeError says whose."""
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
        signature.bind(**taken)
    except TypeError as error:
        raise OwnCodeError(
            f"{capital(who)} cannot be called: {error}. It is offered "
            f"{', '.join(map('`{}`'.format, offered)) or 'nothing'}; give the rest as "
            "`arguments` of its section."
        ) from None
    return taken


def capital(text: str) -> str:
    """For the beginning of a sentence."""
    return text[0].upper() + text[1:]
