"""Recipe, placement and machine as tables, and the commands that repeat a training."""

import shlex
from pathlib import PurePath
from typing import Any

import tomli_w

from samestep.document import formatting as fmt
from samestep.document.blocks import Block, Code, Section, Sheets, Table, Text
from samestep.system.json_values import JsonObject


HARDWARE = {
    "processor": "processor",
    "architecture": "machine",
    "physical cores": "physical_cores",
    "logical processors": "logical_cpus",
}
"""Label -> field of environment.json."""


def settings_sheet(caption: str, fields: JsonObject) -> Table:
    """List nested fields under dotted names."""
    rows = [(name, fmt.setting(value)) for name, value in fmt.flat(dict(fields))]
    return Table(caption, (), rows, words=2)


def machine_section(environment: JsonObject) -> Section:
    """Describe processor, memory, limits, operating system, libraries and data."""
    if not environment:
        unknown = Text("Nothing is known: environment.json is missing or damaged.")
        return Section("Machine and software", "machine", [unknown])
    hardware = settings_sheet("Hardware and limits", _hardware(environment))
    software = settings_sheet("Software", _software(environment))
    blocks: list[Block] = [Sheets([hardware, software])]
    files = _part(environment, "data").get("files")
    if isinstance(files, dict) and files:
        blocks.append(_data_table(files))
    return Section("Machine and software", "machine", blocks)


def repeat_section(
    recipe: JsonObject, placement: JsonObject, run: str, sha256: str | None
) -> Section:
    """Show the recipe as a file, and the commands that train it again."""
    file = str(PurePath(run, "recipe.toml"))
    command = shlex.join(["samestep", "train", file, *_flags(placement)])
    lines = [command + " --out again"]
    if sha256:
        lines.append(shlex.join(["samestep", "compare", run, "again"]))
    code = Code("Train it again and compare the weights", "\n".join(lines))
    return Section("How to repeat it", "repeat", [code, recipe_code(recipe)])


def recipe_code(recipe: JsonObject) -> Code:
    """Show the recipe as TOML."""
    try:
        text = tomli_w.dumps(dict(recipe))
    except TypeError:  # null in a damaged recipe
        text = "\n".join(f"{name} = {value}" for name, value in fmt.flat(dict(recipe)))
    return Code("recipe.toml, from the run directory", text.strip())


def _flags(placement: JsonObject) -> list[str]:
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


def _hardware(environment: JsonObject) -> JsonObject:
    affinity, quota = environment.get("affinity"), environment.get("cpu_quota")
    cores = fmt.setting(environment.get("usable_cores"))
    because = fmt.setting(environment.get("usable_cores_because"))
    caches = {f"cache {k}": v for k, v in _part(environment, "caches").items()}
    sizes = caches | {
        "memory": environment.get("memory_bytes"),
        "memory limit": environment.get("memory_limit_bytes"),
    }
    return {
        "device": environment.get("device", "cpu"),
        **{label: environment.get(name) for label, name in HARDWARE.items()},
        "usable cores": f"{cores} ({because})",
        "allowed processors": (
            _ranges(affinity) if isinstance(affinity, list) else affinity
        ),
        "CPU quota": f"{quota:g} cores" if fmt.is_number(quota) else "none",
        **{k: fmt.size(v) if fmt.is_number(v) else v for k, v in sizes.items()},
    }


def _software(environment: JsonObject) -> JsonObject:
    threads = _part(environment, "thread_variables")
    return {
        "operating system": environment.get("system"),
        "Python": environment.get("python"),
        **_part(environment, "libraries"),
        **(threads or {"thread settings": "none in the environment"}),
    }


def _data_table(files: JsonObject) -> Table:
    rows = []
    for name, file in files.items():
        if isinstance(file, dict):
            size = file.get("bytes")
            size = fmt.count(size) if fmt.is_number(size) else fmt.MISSING
            rows.append((name, size, fmt.setting(file.get("sha256"))))
    return Table("Data files", ("file", "bytes", "SHA-256"), rows)


def _part(environment: JsonObject, name: str) -> JsonObject:
    part = environment.get(name)
    return part if isinstance(part, dict) else {}


def _ranges(numbers: list[Any]) -> str:
    """Return a list of processors as `0-3, 8 (5 processors)`."""
    runs: list[list[int]] = []
    for processor in sorted(number for number in numbers if isinstance(number, int)):
        if runs and processor == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], processor]
        else:
            runs.append([processor])
    shown = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{shown} ({fmt.plural(len(numbers), 'processor')})"
