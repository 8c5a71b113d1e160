import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Train, small_recipe


def samestep(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "samestep", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


SHORT = ["--epochs", "1", "--set", "data.train_samples=1000"]


def test_train_then_evaluate_and_compare(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    trained = samestep("train", *SHORT, "--workers", "1", "--out", one)
    assert trained.returncode == 0, trained.stderr
    assert "test        loss" in trained.stdout
    assert "epoch 1/1  train loss" in trained.stderr
    assert "\x1b" not in trained.stdout + trained.stderr

    again = samestep("train", f"{one}/recipe.toml", "--workers", "2", "--out", two)
    assert again.returncode == 0, again.stderr
    compared = samestep("compare", one, two)
    assert (compared.returncode, compared.stdout) == (0, "identical\n")

    result = json.loads(Path(two, "result.json").read_text())
    for workers in ("1", "3"):
        evaluated = samestep("evaluate", two, "--workers", workers)
        assert evaluated.returncode == 0, evaluated.stderr
        assert f"loss {result['test_loss']:.6f}" in evaluated.stdout
        assert result["weights_sha256"] in evaluated.stdout


def test_compare_names_the_first_epoch_that_differs(
    tmp_path: Path, train: Train
) -> None:
    a, b = train(small_recipe(epochs=2)), train(small_recipe(epochs=2, seed=1))
    compared = samestep("compare", str(a.path), str(b.path))
    assert compared.returncode == 1
    assert "the weights differ from epoch 1 on" in compared.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mnist-mpl"], "Did you mean `mnist-mlp`?"),
        (["train", "--worker", "2"], "--workers"),
        (["train", "--workers", "0"], "workers are a positive number or `auto`"),
        (["train", "--workers", "9"], "9 workers cannot share 4 micro-batches"),
        (["train", "--epochs", "0"], "`epochs`: input should be greater than"),
        (["train", "--epochs", "many"], "'many' is not a valid integer"),
        (["train", "--exchange", "mpi"], "'mpi' is not one of"),
        (["train", "--set", "optimizer.lrr=1"], "Did you mean `optimizer.lr`?"),
        (["train", "--set", "data.train_samples=60000"], "Use at most 55,000"),
        (["trian"], "train"),
        (["evaluate", "nowhere"], "There is no run directory or model file"),
        (["compare", "nowhere", "nowhere"], "nowhere is not a run directory"),
        (["recipes", "mnist"], "No built-in recipe is called `mnist`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_explained_with_exit_code_2(
    arguments: list[str], message: str
) -> None:
    ended = samestep(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ended = samestep("train", "--out", str(tmp_path / "run"))
    assert ended.returncode == 2
    assert "A run never overwrites anything" in ended.stderr
    assert not [*(tmp_path / "run").iterdir()]


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = samestep("train", "--out", str(tmp_path / "file" / "run"))
    assert ended.returncode == 2
    assert "cannot be made: Not a directory" in ended.stderr


@pytest.mark.parametrize("kilobytes", [4, 512])
def test_a_disk_that_stays_full_fails_the_training_and_leaves_no_result(
    tmp_path: Path, kilobytes: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if not mounted or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("a small disk needs `mount` and root")
    try:
        ended = samestep("train", *SHORT, "--out", str(disk / "run"))
        assert ended.returncode == 1, ended.stderr
        assert "cannot be written: No space left on device" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not [*disk.rglob("model.safetensors")]
        result = disk / "run" / "result.json"
        assert (
            not result.exists() or json.loads(result.read_text())["status"] == "failed"
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_recipes_lists_and_prints_what_can_be_trained(tmp_path: Path) -> None:
    assert "mnist-mlp-classic" in samestep("recipes").stdout
    printed = tmp_path / "mine.toml"
    printed.write_text(samestep("recipes", "mnist-mlp").stdout)
    again = samestep("recipes", str(printed))
    assert again.stdout == printed.read_text()


def test_help_shows_examples_and_imports_nothing_slow() -> None:
    shown = samestep("train", "--help")
    assert "samestep train --set optimizer.lr=0.003" in shown.stdout
    code = "import sys, samestep.cli.main; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "numpy", "pydantic", "rich", "psutil"}.intersection(modules)


def test_no_color_is_honoured_and_nothing_is_read_from_a_terminal(
    tmp_path: Path,
) -> None:
    ended = samestep(
        "train", *SHORT, "--out", str(tmp_path / "run"), NO_COLOR="1", FORCE_COLOR=""
    )
    assert ended.returncode == 0
    assert "\x1b" not in ended.stderr
