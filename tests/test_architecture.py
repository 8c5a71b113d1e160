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


def test_the_file_map_of_the_readme_equals_the_tree() -> None:
    readme = code_blocks(ROOT / "README.md")
    (listed,) = (block for _, block in readme if "src/samestep/" in block)
    named = set(re.findall(r"[\w.-]+\.(?:py|md)\b|[\w-]+(?=/)", listed))
    package, benchmarks = ROOT / "src" / "samestep", ROOT / "benchmarks"
    modules = {
        path.name for path in [*package.glob("[!_]*.py"), *benchmarks.glob("*.py")]
    }
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert (modules | packages) - named == set()
    known = {path.name for path in [*ROOT.glob("*"), *ROOT.glob("[!.]*/**/*")]}
    assert named - known == set()


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
