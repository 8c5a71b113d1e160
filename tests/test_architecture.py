"""The architecture as CONTRIBUTING.md and the README state it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from documents import ROOT

from samestep import Placement, Recipe
from samestep.cli import cli


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
