"""Flags that have been renamed: the old ones work for one release, with a warning."""

from collections.abc import Sequence

from samestep.errors import warn_old_name


RENAMED = {
    "--accept-other-bits": "--allow-different-numerics",
    "--endpoint": "--rdzv-endpoint",
    "--evict-slower-than": "--drop-stragglers-below",
}


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with renamed flags replaced, and warn of each of them."""
    return [_renamed(argument) for argument in arguments]


def _renamed(argument: str) -> str:
    flag, *value = argument.split("=", 1)
    if flag not in RENAMED:
        return argument
    warn_old_name(flag, RENAMED[flag])
    return "=".join([RENAMED[flag], *value])
