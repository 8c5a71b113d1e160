"""The architecture as CONTRIBUTING.md and the README state it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from documents import ROOT, code_blocks

from samestep import Placement, Recipe
from samestep.cli.main import cli


def test_imports_run_downward_only() -> None:
    """The contracts are in pyproject.toml."""
    ended = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def test_the_readme_maps_every_package_once_and_names_only_modules_that_exist() -> None:
    blocks = [block for _, block in code_blocks(ROOT / "README.md")]
    (listed,) = (block for block in blocks if "src/samestep/" in block)
    source = ROOT / "src" / "samestep"
    entries = re.findall(r"^  (\w+)/ +(.+)$", listed, re.MULTILINE)
    packages = [path.parent.name for path in source.glob("*/__init__.py")]
    assert sorted(name for name, _ in entries) == sorted([*packages, "recipes"])
    for name, description in entries:
        for module in re.findall(r"[\w*]+\.py", description):
            assert list((source / name).glob(module)), f"{name}/{module}"


def test_contributing_lists_every_benchmark() -> None:
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{script.name}`" in listed, script.name


@pytest.mark.parametrize("model", [Recipe, Placement])
def test_every_field_says_what_it_means(model: Any) -> None:
    schema = model.model_json_schema()
    sections = {"": schema} | schema.get("$defs", {})
    silent = [
        f"{section}.{name}"
        for section, kind in sections.items()
        for name, field in kind.get("properties", {}).items()
        if not {"description", "const", "oneOf"} & field.keys()
    ]
    assert silent == []


def test_every_option_says_what_it_means() -> None:
    for command in cli.commands.values():
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, (command.name, option.name)


def test_every_field_of_a_placement_is_an_option_of_train() -> None:
    names = {param.name for param in cli.commands["train"].params}
    assert set(Placement.model_fields) <= names
