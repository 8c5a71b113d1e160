"""What is released works without the repository: sdist, wheel, a clean environment."""

import os
import platform
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, small_recipe
from documents import ROOT

from samestep import Run
from samestep.kernels import compiling, targets


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, **options
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so this is complete too."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "src"
    library = targets.library_path().relative_to(package)
    sources = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } - {str(library)}
    assert {"samestep/py.typed", "samestep/recipes/mnist-mlp.toml"} <= sources
    assert "samestep/kernels/csrc/runner/main.c" in sources
    compiled = {str(library)} if compiling.machine_compiler() else set()
    assert _files(wheel) == sources | compiled


def _files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as packed:
        return {name for name in packed.namelist() if ".dist-info/" not in name}


def test_the_tag_of_a_wheel_is_that_of_its_kernels(wheel: Path) -> None:
    if compiling.machine_compiler() is None:
        pytest.skip("there is no C compiler")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")


def test_without_a_compiler_a_wheel_is_made_without_kernels(tmp_path: Path) -> None:
    """As is one with a compiler that fails. A wheel for a platform needs them."""
    (tmp_path / "ziglang.py").write_text("raise SystemExit(1)")
    env = {name: value for name, value in os.environ.items() if name != "CC"}
    env |= {"PATH": "", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
    command += ["--skip-dependency-check"]  # it asks for ziglang
    run(*command, "--outdir", tmp_path, ROOT, env=env)
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    assert str(targets.library_path().relative_to(ROOT / "src")) not in _files(built)

    env["SAMESTEP_WHEEL"] = "manylinux_2_17_x86"
    ended = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode
    assert "Did you mean `manylinux_2_17_x86_64`?" in ended.stdout + ended.stderr


def test_a_wheel_trains_in_a_clean_environment(
    wheel: Path, tmp_path: Path, train: Train
) -> None:
    """The libraries are those of the tests, found by a path; samestep is not there."""
    home = tmp_path / "clean"
    venv.create(home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout
    libraries = sysconfig.get_paths()["purelib"]
    Path(site.strip(), "libraries.pth").write_text(f"{libraries}\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = {"cwd": tmp_path, "env": env | {"SAMESTEP_CACHE": str(tmp_path / "cache")}}

    origin = run(python, "-c", "import samestep; print(samestep.__file__)", **where)
    assert Path(origin.stdout).is_relative_to(home)
    recipe = small_recipe()
    (tmp_path / "small.toml").write_text(recipe.to_toml())
    call = ("train", "small.toml", "--workers", "2", "--out", "run")
    run(home / "bin" / "samestep", *call, **where)
    trained = Run.open(tmp_path / "run")
    assert trained.weights_sha256 == train(recipe).weights_sha256
    assert "<svg" in trained.path.joinpath("report.html").read_text()


def test_the_version_has_its_part_of_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\n## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
