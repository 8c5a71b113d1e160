"""Old names of fields, flags and keywords: they work with a warning."""

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import tomli_w
from conftest import Train, small_recipe
from test_cli import samestep

from samestep import (
    Placement,
    PlacementError,
    Recipe,
    RecipeError,
    Run,
    RunError,
    evaluate,
    resume,
)
from samestep.cli import main
from samestep.config.renames import (
    FLAGS,
    NEW_NAMES,
    OLD_NAMES,
    new_flags,
    new_name,
    rename,
)
from samestep.errors import OldNameWarning
from samestep.output.console import SilentView
from samestep.report.load import read_run
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer
from samestep.user_code.arguments import placement_of, recipe_of, split_fields


NEW: dict[str, Any] = {
    "early_stopping": {"patience": 2},
    "init": {"weights": "a.pt", "reinit": ["head"]},
    "optimizer": {"name": "sgd", "lr": 0.1, "max_grad_norm": 1.0},
}
OLD: dict[str, Any] = {
    "stop": {"patience": 2},
    "start": {"weights": "a.pt", "fresh": ["head"]},
    "optimizer": {"name": "sgd", "lr": 0.1, "clip_norm": 1.0},
}
PLAIN = {"name": "x", "epochs": 1, "global_batch": 4, "micro_batches": 2}


def warned(caught: Any) -> list[str]:
    return sorted(str(warning.message).split("`")[1] for warning in caught)


def test_old_names_of_a_recipe_work_with_one_warning_each() -> None:
    with pytest.warns(OldNameWarning) as caught:
        recipe = Recipe.from_dict(PLAIN | OLD)
    assert recipe == Recipe.from_dict(PLAIN | NEW)
    assert warned(caught) == sorted(NEW_NAMES)


def test_old_names_in_a_file_work_with_one_warning_each(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(tomli_w.dumps(PLAIN | OLD))
    with pytest.warns(OldNameWarning) as caught:
        recipe = Recipe.load(file, {"early_stopping.patience": 3})
    assert recipe.early_stopping is not None
    assert recipe.early_stopping.patience == 3
    assert warned(caught) == sorted(NEW_NAMES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stop.patience", "early_stopping.patience"),
        ("start.weights", "init.weights"),
        ("start.fresh", "init.reinit"),
        ("optimizer.clip_norm", "optimizer.max_grad_norm"),
        ("schedule.start", "schedule.start"),
        ("model.arguments.stop", "model.arguments.stop"),
        ("seed", "seed"),
    ],
)
def test_a_field_of_a_renamed_section_goes_along(old: str, new: str) -> None:
    assert new_name(old) == new
    assert new_name(new, OLD_NAMES) == old


def test_old_names_work_in_overrides_and_keywords() -> None:
    keywords = {"optimizer__clip_norm": 1.0, "stop__patience": 4}
    fields, _ = split_fields(keywords)
    with pytest.warns(OldNameWarning) as caught:
        recipe = recipe_of("mnist-mlp", {}, fields)
    assert warned(caught) == ["optimizer.clip_norm", "stop.patience"]
    new = {"optimizer.max_grad_norm": 1.0, "early_stopping.patience": 4}
    assert recipe == Recipe.load("mnist-mlp", new)
    with pytest.warns(OldNameWarning, match="is now `early_stopping`"):
        assert recipe == recipe.changed({"stop": {"patience": 4}})


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": {}, "early_stopping": {}},
        {"start.weights": "a", "init.weights": "a"},
        {"optimizer": {"name": "sgd", "lr": 1.0, "clip_norm": 1, "max_grad_norm": 1}},
    ],
)
def test_a_field_under_both_names_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="the old and the new name of one field"):
        Recipe.load("mnist-mlp", fields, warn=False)


def test_a_rename_changes_no_digest() -> None:
    fields = {"optimizer.max_grad_norm": 0.05, "early_stopping": {"patience": 9}}
    digest = Recipe.load("mnist-mlp", {"arithmetic": "torch", **fields}).digest
    assert digest == "04df4615e840939c187beba96a9d8a894d668eaec2346c5e918db1dcbf03c2e7"


def test_the_command_line_shows_an_old_name_in_one_line() -> None:
    command = [sys.executable, "-m", "samestep", "scale", "--set", "stop.patience=0"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    warning, error = ended.stderr.splitlines()
    assert warning.startswith("warning: `stop.patience` is now `early_stopping.pat")
    assert "`early_stopping.patience`: input should be" in error


def as_written_before(run: Path) -> None:
    """Give a run the names that an earlier version has written."""
    recipe = rename(Run.open(run).recipe.to_dict(), OLD_NAMES)
    (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
    result = json.loads((run / "result.json").read_text()) | {"recipe": recipe}
    placement = result["placement"]
    placement["evict_slower_than"] = placement.pop("drop_stragglers_below")
    (run / "result.json").write_text(json.dumps(result))
    _rewrite_model(run / "model.safetensors", {"recipe": json.dumps(recipe)})
    for folder in checkpoint.directory_of(run).iterdir():
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        del manifest["digest"]
        manifest["recipe"] = recipe
        manifest["digest"] = checkpoint.digest_of(manifest)
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def _rewrite_model(file: Path, metadata: Mapping[str, str]) -> None:
    tensors = safetensors.numpy.load(file.read_bytes())
    safetensors.numpy.save_file(tensors, file, dict(metadata))


def test_an_old_run_is_read_evaluated_and_resumed_without_a_warning(
    train: Train, server: ForkServer
) -> None:
    fields = {"optimizer__max_grad_norm": 0.05, "early_stopping": {"patience": 9}}
    recipe = small_recipe(**fields, schedule={"name": "constant"})
    run, longer = train(recipe), train(recipe.changed({"epochs": 2}))
    as_written_before(run.path)
    assert "clip_norm = 0.05" in (run.path / "recipe.toml").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = Run.open(run.path)
        assert old.recipe == recipe
        assert old.recipe.digest == recipe.digest
        result = read_run(run.path).result
        assert result.recipe == recipe.to_dict()
        assert result.placement == run.result["placement"]
        assert evaluate(old.model_file, server=server).loss == run.result["test_loss"]
        view = SilentView()
        again = resume(old, epochs=2, view=view, server=server)
    assert again.weights_sha256 == longer.weights_sha256


def test_old_flags_are_replaced_with_one_warning_each() -> None:
    old = ["train", "--endpoint", "h:1", "--evict-slower-than=0.1"]
    new = ["train", "--rdzv-endpoint", "h:1", "--drop-stragglers-below=0.1"]
    with pytest.warns(OldNameWarning) as caught:
        assert new_flags(old) == new
    assert len(caught) == 2
    assert "`--endpoint` is now `--rdzv-endpoint`" in str(caught[0].message)


def test_every_new_flag_is_an_option_and_no_old_one_is() -> None:
    commands = main.cli.commands["train"], main.cli.commands["resume"]
    flags = {flag for command in commands for p in command.params for flag in p.opts}
    assert flags >= set(FLAGS.values())
    assert not flags & set(FLAGS)


def test_an_old_keyword_of_a_placement_works_with_a_warning() -> None:
    with pytest.warns(OldNameWarning, match="is now `drop_stragglers_below`"):
        placement = Placement.model_validate({"evict_slower_than": 0.5})
    assert placement.drop_stragglers_below == 0.5


def test_a_keyword_of_a_placement_under_both_names_is_refused() -> None:
    fields = {"evict_slower_than": 0.5, "drop_stragglers_below": 0.4}
    with (
        pytest.warns(OldNameWarning),
        pytest.raises(PlacementError, match="the old and the new name of one field"),
    ):
        placement_of(None, fields)


def test_the_command_line_warns_of_an_old_flag_in_one_line() -> None:
    ended = samestep("compare", "--endpoint", "h:1")
    first, *rest = ended.stderr.splitlines()
    assert first == (
        "warning: `--endpoint` is now `--rdzv-endpoint`; the old name goes with the "
        "next release."
    )
    assert "No such option" in rest[-1]


def test_an_old_keyword_of_resume_works_with_a_warning(
    server: ForkServer, tmp_path: Path
) -> None:
    old: dict[str, Any] = {"accept_other_bits": True}
    with (
        pytest.warns(OldNameWarning, match="is now `allow_different_numerics`"),
        pytest.raises(RunError, match="not a run directory"),
    ):
        resume(tmp_path, server=server, **old)
