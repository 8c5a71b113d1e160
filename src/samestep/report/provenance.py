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


def settings_sheet(caption: str, fields: Json) -> Sheet:
    """Nested fields under dotted names."""
    rows = [(name, setting(value)) for name, value in flat(dict(fields))]
    return Sheet(caption, rows)


def machine_section(environment: Json) -> Section:
    """Processor, memory, limits, operating system, libraries, threads, data."""
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


def repeat_section(recipe: Json, placement: Json, run: str, sha256: str) -> Section:
    """The recipe as a file, and the commands that train it again."""
    file = str(PurePath(run, "recipe.toml"))
    command = shlex.join(["samestep", "train", file, *_flags(placement)])
    lines = [command + " --out again"]
    if sha256:
        lines.append(shlex.join(["samestep", "compare", run, "again"]))
    return Section(
        "How to repeat it",
        "repeat",
        [
            Code("Train it again and compare the weights", "\n".join(lines)),
            recipe_code(recipe),
        ],
    )


def recipe_code(recipe: Json) -> Code:
    """The recipe as TOML."""
    try:
        text = tomli_w.dumps(dict(recipe))
    except TypeError:  # null in a damaged recipe
        text = "\n".join(f"{name} = {value}" for name, value in flat(dict(recipe)))
    return Code("recipe.toml, which is in the run directory", text.strip())


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
    rows: list[Row] = [
        ("device", setting(environment.get("device", "cpu"))),
        ("processor", setting(environment.get("processor"))),
        ("architecture", setting(environment.get("machine"))),
        ("physical cores", setting(environment.get("physical_cores"))),
        ("logical processors", setting(environment.get("logical_cpus"))),
        (
            "usable cores",
            f"{setting(environment.get('usable_cores'))} "
            f"({setting(environment.get('usable_cores_because'))})",
        ),
        (
            "allowed processors",
            _ranges(affinity) if isinstance(affinity, list) else setting(affinity),
        ),
        ("CPU quota", f"{quota:g} cores" if is_number(quota) else "none"),
    ]
    rows += [
        (f"cache {name}", size(value))
        for name, value in _part(environment, "caches").items()
        if is_number(value)
    ]
    for label, name in (
        ("memory", "memory_bytes"),
        ("memory limit", "memory_limit_bytes"),
    ):
        value = environment.get(name)
        rows.append((label, size(value) if is_number(value) else setting(value)))
    return rows


def _software(environment: Json) -> list[Row]:
    rows: list[Row] = [
        ("operating system", setting(environment.get("system"))),
        ("Python", setting(environment.get("python"))),
    ]
    libraries = _part(environment, "libraries").items()
    rows += [(str(name), setting(version)) for name, version in libraries]
    threads = _part(environment, "thread_variables").items()
    rows += [(str(name), setting(value)) for name, value in threads]
    if not threads:
        rows.append(("thread settings", "none in the environment"))
    return rows


def _data_table(files: Json) -> Table:
    rows = [
        (
            str(name),
            count(found["bytes"]) if is_number(found.get("bytes")) else MISSING,
            setting(found.get("sha256")),
        )
        for name, found in files.items()
        if isinstance(found, Mapping)
    ]
    return Table("Data files", ("file", "bytes", "SHA-256"), rows)


def _part(environment: Json, name: str) -> Json:
    found = environment.get(name)
    return found if isinstance(found, Mapping) else {}


def _ranges(numbers: list[Any]) -> str:
    """`0-3, 8 (5 processors)`."""
    runs: list[list[int]] = []
    for one in sorted(number for number in numbers if isinstance(number, int)):
        if runs and one == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], one]
        else:
            runs.append([one])
    shown = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{shown} ({plural(len(numbers), 'processor')})"
