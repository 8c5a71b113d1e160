"""The user's own code, named `module:function`: where it is, and how it is imported."""

import contextlib
import hashlib
import importlib
import os
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from samestep.errors import UsageError, did_you_mean


HERE = str(Path(__file__).parents[1])


def load(name: str, role: str) -> Callable[..., Any]:
    """The callable that `module:function` names; importing it runs the module's code.

    `role` says in messages what it is for, such as `tracker`. Raises UsageError.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        example = role.split()[0]
        raise UsageError(
            f"A {role} is named as `module:function`, such as `mine:{example}` for "
            f"`{example}` in mine.py; received `{name}`."
        )
    module = _import(module_name, role)
    found: Any = module
    for part in function.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UsageError(
            f"A {role} must be callable, and `{module_name}` ({module.__file__}) has "
            f"no function `{function}`.{did_you_mean(function, known)}"
        )
    loaded: Callable[..., Any] = found
    return loaded


def search_path() -> list[str]:
    """Where modules are looked for; the current directory last.

    So no file there takes the place of a library.
    """
    here = os.getcwd()  # noqa: PTH109  as in sys.path
    return [*(each for each in sys.path if each not in ("", here)), here]


def source_of(name: str, role: str) -> Path:
    """The file of the module in `module:function`; no code runs. Raises UsageError."""
    places: Sequence[str] = search_path()
    so_far: list[str] = []
    found = None
    for part in name.partition(":")[0].split("."):
        so_far.append(part)
        found = PathFinder.find_spec(".".join(so_far), places)
        if found is None:
            raise _missing(".".join(so_far), role, places)
        places = list(found.submodule_search_locations or ())
    if found is None or not found.origin:
        raise UsageError(f"The module of the {role} `{name}` has no file.")
    return Path(found.origin)


def checksum_of(name: str, role: str) -> str:
    """SHA-256 of the file that the function is in. Raises UsageError."""
    return hashlib.sha256(source_of(name, role).read_bytes()).hexdigest()


def is_near(path: Path) -> bool:
    """Whether a file is the user's: below the current directory, not installed."""
    below = path.resolve().is_relative_to(Path.cwd())
    return below and "site-packages" not in path.parts


@contextlib.contextmanager
def on_path(places: Sequence[str]) -> Iterator[None]:
    """What is not on Python's path yet is, last, inside this context."""
    added = [place for place in places if place not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for place in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(place)


def own_frames(error: BaseException) -> str:
    """The traceback without the frames of samestep and of installed libraries.

    Empty if none is left.
    """
    libraries = [HERE, *(sysconfig.get_path(n) for n in ("stdlib", "purelib"))]
    kept = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*libraries, "<frozen"))
    ]
    if not kept:
        return ""
    return "".join(
        [
            "Traceback (most recent call last):\n",
            *traceback.format_list(kept),
            *traceback.format_exception_only(error),
        ]
    )


def explain(error: BaseException) -> str:
    """`KeyError: 'loss' (mine.py, line 12)`: where it was raised in others' code."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    ours = (__file__, str(Path(HERE) / "tracking.py"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename not in ours and "importlib" not in frame.filename:
            return f"{text} ({Path(frame.filename).name}, line {frame.lineno})"
    return text


def _import(name: str, role: str) -> ModuleType:
    with on_path([os.getcwd()]):  # noqa: PTH109  as in sys.path
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if not f"{name}.".startswith(f"{missing}."):  # the module lacks another
                raise _broken(name, role, error) from error
            inside = getattr(
                sys.modules.get(missing.rpartition(".")[0]), "__path__", []
            )
            raise _missing(missing, role, inside) from None
        except Exception as error:
            raise _broken(name, role, error) from error


def _missing(name: str, role: str, inside: Sequence[str]) -> UsageError:
    parent = name.rpartition(".")[0]
    nearby = [*pkgutil.iter_modules(), *pkgutil.iter_modules([str(Path.cwd())])]
    known = [module.name for module in nearby]
    if parent:
        known += [m.name for m in pkgutil.iter_modules(inside, f"{parent}.")]
    return UsageError(
        f"A {role}'s module must be installed or in the current directory; there is "
        f"no `{name}`.{did_you_mean(name, known)}"
    )


def _broken(name: str, role: str, error: Exception) -> UsageError:
    return UsageError(
        f"The {role}'s module `{name}` cannot be imported: {explain(error)}."
    )
