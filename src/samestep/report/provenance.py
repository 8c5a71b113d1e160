"""Recipe, placement and machine as tables, and the commands that repeat a training."""

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import tomli_w

from samestep.document.blocks import (
    Block,
    Code,
    Row,
    Section,
    Sheet,
    Sheets,
    Table,
    Text,
)
from samestep.document.formatting import (
    MISSING,
    count,
    flat,
    is_number,
    plural,
    setting,
    size,
)


Json = Mapping[str, Any]
HARDWARE = {
    "processor": "processor",
    "architecture": "machine",
    "physical cores": "physical_cores",
    "logical processors": "logical_cpus",
}
"""Label -> field of environment.json."""


def settings_sheet(caption: str, fields: Json) -> Sheet:
    """List nested fields under dotted names."""
    rows = [(name, setting(value)) for name, value in flat(dict(fields))]
    return Sheet(caption, rows)


def machine_section(environment: Json) -> Section:
    """Describe processor, memory, limits, operating system, libraries and data."""
    if not environment:
        unknown = Text("Nothing is known: environment.json is missing or damaged.")
        return Section("Machine and software", "machine", [unknown])
    hardware = Sheet("Hardware and limits", _hardware(environment))
    software = Sheet("Software", _software(environment))
    blocks: list[Block] = [Sheets([hardware, software])]
    files = _part(environment, "data").get("files")
    if isinstance(files, Mapping) and files:
        blocks.append(_data_table(files))
    return Section("Machine and software", "machine", blocks)


def repeat_section(
    recipe: Json, placement: Json, run: str, sha256: str | None
) -> Section:
    """Show the recipe as a file, and the commands that train it again."""
    file = str(PurePath(run, "recipe.toml"))
    command = shlex.join(["samestep", "train", file, *_flags(placement)])
    lines = [command + " --out again"]
    if sha256:
        lines.append(shlex.join(["samestep", "compare", run, "again"]))
    code = Code("Train it again and compare the weights", "\n".join(lines))
    return Section("How to repeat it", "repeat", [code, recipe_code(recipe)])


def recipe_code(recipe: Json) -> Code:
    """Show the recipe as TOML."""
    try:
        text = tomli_w.dumps(dict(recipe))
    except TypeError:  # null in a damaged recipe
        text = "\n".join(f"{name} = {value}" for name, value in flat(dict(recipe)))
    return Code("recipe.toml, from the run directory", text.strip())


def _flags(placement: Json) -> list[str]:
    flags: list[str] = []
    for name in ("workers", "exchange"):
        if placement.get(name) is not None:
            flags += [f"--{name}", str(placement[name])]
    if placement.get("device", "cpu") != "cpu":
        flags += ["--device", str(placement["device"])]
    balance = placement.get("balance")
    if isinstance(balance, (list, tuple)):
        flags += ["--balance", ",".join(map(str, balance))]
    elif balance == "off":
        flags += ["--balance", "off"]
    return flags


def _hardware(environment: Json) -> list[Row]:
    affinity = environment.get("affinity")
    quota = environment.get("cpu_quota")
    cores = setting(environment.get("usable_cores"))
    because = setting(environment.get("usable_cores_because"))
    allowed = _ranges(affinity) if isinstance(affinity, list) else setting(affinity)
    caches = _part(environment, "caches").items()
    return [
        ("device", setting(environment.get("device", "cpu"))),
        *((label, setting(environment.get(name))) for label, name in HARDWARE.items()),
        ("usable cores", f"{cores} ({because})"),
        ("allowed processors", allowed),
        ("CPU quota", f"{quota:g} cores" if is_number(quota) else "none"),
        *((f"cache {name}", size(value)) for name, value in caches if is_number(value)),
        ("memory", _size(environment.get("memory_bytes"))),
        ("memory limit", _size(environment.get("memory_limit_bytes"))),
    ]


def _size(value: Any) -> str:
    return size(value) if is_number(value) else setting(value)


def _software(environment: Json) -> list[Row]:
    libraries = _part(environment, "libraries")
    threads = _part(environment, "thread_variables")
    none = {} if threads else {"thread settings": "none in the environment"}
    shown = {
        "operating system": environment.get("system"),
        "Python": environment.get("python"),
        **libraries,
        **threads,
        **none,
    }
    return [(str(name), setting(value)) for name, value in shown.items()]


def _data_table(files: Json) -> Table:
    rows = [
        (
            str(name),
            count(file["bytes"]) if is_number(file.get("bytes")) else MISSING,
            setting(file.get("sha256")),
        )
        for name, file in files.items()
        if isinstance(file, Mapping)
    ]
    return Table("Data files", ("file", "bytes", "SHA-256"), rows)


def _part(environment: Json, name: str) -> Json:
    part = environment.get(name)
    return part if isinstance(part, Mapping) else {}


def _ranges(numbers: list[Any]) -> str:
    """Return a list of processors as `0-3, 8 (5 processors)`."""
    runs: list[list[int]] = []
    for processor in sorted(number for number in numbers if isinstance(number, int)):
        if runs and processor == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], processor]
        else:
            runs.append([processor])
    shown = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{shown} ({plural(len(numbers), 'processor')})"
