"""Compiles the kernels: `python -m samestep.kernels.compiling`.

Needs nothing but the standard library, since the build backend (hatch_build.py) runs it
too, before what samestep needs is installed. Each instruction set is one compilation of
kernels.c; they run at the same time and are linked into one library.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from samestep.errors import KernelError
from samestep.kernels.targets import (
    ISAS,
    SOURCES,
    Target,
    library_path,
    sources_digest,
    this_target,
)


# Nothing may be contracted or reordered: docs/arithmetic.md decides every rounding.
FLAGS = (
    *("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno"),
    *("-fvisibility=hidden", "-Wall", "-Wextra"),
)


def machine_compiler() -> list[str] | None:
    """Return the command of a C compiler that works here: $CC, cc, gcc or clang."""
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]) and _works(words):
            return words
    return None


def zig_compiler(target: Target) -> list[str]:
    """Return the command of the compiler in the PyPI package `ziglang`.

    It compiles for any target on any machine. Raises KernelError if it is not there.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise KernelError(
            "The kernels need a C compiler, and there is none: install gcc or clang "
            "(Debian: apt install gcc libc6-dev), or `pip install ziglang`."
        )
    return [sys.executable, "-m", "ziglang", "cc", "-target", target.zig]


def find_compiler() -> list[str]:
    """Return the command of a compiler for this machine; raise KernelError if none."""
    return machine_compiler() or zig_compiler(this_target())


def compile_here(command: Sequence[str] = (), extra: Iterable[str] = ()) -> None:
    """Compile the library beside this package, by default with the compiler found.

    Raises KernelError.
    """
    target = this_target()
    compile_library(library_path(), command or find_compiler(), target, extra)


def compile_library(
    out: Path, command: Sequence[str], target: Target, extra: Iterable[str] = ()
) -> None:
    """Compile the kernels of all instruction sets of a target into one library.

    `extra` are more flags for the compiler. A library that is there already is replaced
    in one piece: processes that have loaded it keep the old one. Raises KernelError
    with the compiler's output.
    """
    link = ["-shared", "-s"] if target.system != "darwin" else ["-shared"]
    if "ziglang" in command and target.system != "windows":
        link += ["-nostdlib", "-lc"]  # else it compiles a runtime that nothing needs
    with tempfile.TemporaryDirectory() as scratch:
        objects = _compile_units(Path(scratch), command, target, extra)
        made = Path(scratch) / out.name
        _run([*command, *link, *extra, "-o", str(made), *objects])
        beside = out.with_name(f".{out.name}.{os.getpid()}")
        shutil.copyfile(made, beside)
        beside.replace(out)


def compile_runner(
    out: Path,
    command: Sequence[str],
    target: Target,
    extra: Iterable[str] = (),
    isas: Iterable[str] = (),
) -> None:
    """Compile the program that runs a training from a file, `samestep-runner FILE`.

    It has the kernels of `isas`, by default of all. Raises KernelError with the
    compiler's output.
    """
    flags = [*FLAGS, *extra]
    with tempfile.TemporaryDirectory() as scratch:
        objects = _compile_units(Path(scratch), command, target, extra, isas)
        sources = map(str, sorted((SOURCES / "runner").glob("*.c")))
        _run([*command, *flags, "-o", str(out), *sources, *objects, "-lm"])


def _compile_units(
    directory: Path,
    command: Sequence[str],
    target: Target,
    extra: Iterable[str],
    isas: Iterable[str] = (),
) -> list[str]:
    """Compile every unit of the library, at the same time; return the object files."""
    flags = [*FLAGS, *extra]
    if target.system != "windows":
        flags.append("-fPIC")
    flags_of = ISAS[target.architecture]
    chosen = list(isas) or list(flags_of)
    units = {isa: ["kernels.c", f"-DISA={isa}", *flags_of[isa]] for isa in chosen}
    best_first = " ".join(f"WITH({isa})" for isa in reversed(chosen))
    units["library"] = [
        "library.c",
        f"-DCOMPILED_IN={best_first}",
        f'-DSOURCES="{sources_digest()}"',
    ]

    def compile_unit(name: str) -> str:
        source, *own = units[name]
        made = str(directory / f"{name}.o")
        source = str(SOURCES / source)
        _run([*command, *flags, *own, "-c", source, "-o", made])
        return made

    with ThreadPoolExecutor() as threads:
        return list(threads.map(compile_unit, units))


def _works(command: Sequence[str]) -> bool:
    """Return whether a compiler finds the headers and links a library."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "try.c"
        source.write_text("#include <stdint.h>\n#include <string.h>\n")
        try:
            _run([*command, "-shared", "-fPIC", str(source), "-o", f"{source}.so"])
        except KernelError:
            return False
    return True


def _run(command: Sequence[str]) -> None:
    try:
        ended = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise KernelError(f"`{command[0]}` cannot be started: {error}") from None
    if ended.returncode != 0:
        raise KernelError(f"`{shlex.join(command)}` failed:\n{ended.stderr}")


def main() -> None:
    """Compile the library of this installation, or the runner of trainings in files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--cc", help="the compiler's command; default: $CC, cc, gcc ..."
    )
    parser.add_argument("--werror", action="store_true", help="warnings are errors")
    parser.add_argument("--runner", type=Path, help="where to put the runner")
    options = parser.parse_args()
    command = shlex.split(options.cc or "")
    extra = ["-Werror"] if options.werror else []
    try:
        if options.runner:
            command = command or find_compiler()
            compile_runner(options.runner, command, this_target(), extra)
        else:
            compile_here(command, extra)
    except (KernelError, OSError) as error:
        sys.exit(str(error))
    print(options.runner or library_path())


if __name__ == "__main__":
    main()
