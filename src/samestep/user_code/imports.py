"""Finds and imports user code that is named `module:function`."""

import contextlib
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


HERE = str(Path(__file__).parents[1]) + os.sep
"""The directory of samestep's own code."""


def load(name: str, role: str) -> Callable[..., Any]:
    """Return the callable that `module:function` names.

    Importing it runs the module's code. `role`, such as `tracker`, is what messages
    call it. Raises UsageError.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        example = role.split()[0]
        raise UsageError(
            f"A {role} is named as `module:function`, such as `mine:{example}` for "
            f"`{example}` in mine.py; received `{name}`."
        )
    module = _import(module_name, role)
    value: Any = module
    for part in function.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UsageError(
            f"A {role} must be callable, and `{module_name}` ({module.__file__}) has "
            f"no function `{function}`.{did_you_mean(function, known)}"
        )
    loaded: Callable[..., Any] = value
    return loaded


def search_path() -> list[str]:
    """Return the directories where modules are looked for.

    The current directory comes last, so that no file there replaces a library.
    """
    here = os.getcwd()  # noqa: PTH109  as in sys.path
    return [*(each for each in sys.path if each not in ("", here)), here]


def file_of(name: str, role: str) -> Path:
    """Return the file of the module in `module:function`, without running any code.

    `importlib.util.find_spec` would import the packages around it. Raises UsageError.
    """
    directories: Sequence[str] = search_path()
    parents: list[str] = []
    spec = None
    for part in name.partition(":")[0].split("."):
        parents.append(part)
        spec = PathFinder.find_spec(".".join(parents), directories)
        if spec is None:
            raise _missing(".".join(parents), role, directories)
        directories = list(spec.submodule_search_locations or ())
    if spec is None or not spec.origin:
        raise UsageError(f"The module of the {role} `{name}` has no file.")
    return Path(spec.origin)


def is_near(path: Path) -> bool:
    """Return whether a file is below the current directory and not installed there."""
    is_below = path.resolve().is_relative_to(Path.cwd())
    return is_below and "site-packages" not in path.parts


@contextlib.contextmanager
def on_path(directories: Sequence[str]) -> Iterator[None]:
    """Append directories to Python's path, unless they are there, in this context."""
    added = [each for each in directories if each not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for directory in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(directory)


def user_frames(error: BaseException) -> str:
    """Return the traceback without the frames of samestep and of installed libraries.

    If no frame is left, it is the notes: of an error in another process, its frames.
    """
    libraries = [HERE, *(sysconfig.get_path(n) for n in ("stdlib", "purelib"))]
    kept = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*libraries, "<frozen"))
    ]
    if not kept:
        return "\n".join(getattr(error, "__notes__", []))
    lines = [*traceback.format_list(kept), *traceback.format_exception_only(error)]
    return "".join(["Traceback (most recent call last):\n", *lines])


def explain(error: BaseException) -> str:
    """Return `KeyError: 'loss' (mine.py, line 12)`: the last frame outside samestep."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(HERE) and "importlib" not in frame.filename:
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
            package = sys.modules.get(missing.rpartition(".")[0])
            inside = getattr(package, "__path__", [])
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
