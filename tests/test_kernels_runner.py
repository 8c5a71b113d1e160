"""The runner in C: the same bits as called by Python, there and under sanitizers."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import kernel_trainings
import numpy as np
import pytest
from conftest import Own, Train
from golden import FILE, SMALL
from kernel_trainings import PythonRun

from samestep import DataError, KernelError
from samestep.api.record import record
from samestep.kernels import compiling, library, targets
from samestep.kernels.interface import OptimizerKind
from samestep.kernels.program_file import ProgramFile


GOLDEN = json.loads(FILE.read_text())
SANITIZED = ("-fsanitize=address,undefined", "-g", "-fno-sanitize-recover=all")
# Optimization must not matter, and compiling is faster without.
FAST = ("-O1",)
Runner = Callable[[ProgramFile], dict[str, str]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runner")


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the best instruction set below AVX-512, to compile one only.

    It takes half a minute: one process of pytest does so for all of them.
    """
    own = tmp_path_factory.getbasetemp()
    directory = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    out = directory / "sanitized"
    isas = [isa for isa in library.supported_isas() if isa != "v4"]
    with (directory / "sanitized.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return out if out.exists() else _compile_sanitized(out, "-O0", isas[:1])


def _compile_sanitized(out: Path, level: str, isas: list[str]) -> Path:
    command = compiling.machine_compiler()
    if command is None:
        pytest.skip("there is no C compiler")
    flags = [*SANITIZED, level]
    try:
        compiling.compile_runner(out, command, targets.this_target(), flags, isas)
    except KernelError as error:
        if "libasan" in str(error) or "libubsan" in str(error):
            pytest.skip("the compiler has no sanitizers")
        raise
    return out


@pytest.fixture(scope="module")
def aarch64(build: Path) -> list[str]:
    """The command that runs it: a static program, in an emulator elsewhere."""
    out = build / "aarch64"
    emulator = [] if targets.architecture() == "aarch64" else ["qemu-aarch64-static"]
    if emulator and shutil.which(emulator[0]) is None:
        pytest.skip(f"there is no {emulator[0]} (Debian: qemu-user-static)")
    target = targets.target_of("manylinux_2_17_aarch64")
    if shutil.which("aarch64-linux-gnu-gcc"):
        command, extra = ["aarch64-linux-gnu-gcc"], [*FAST, "-static"]
    else:
        static = target._replace(zig="aarch64-linux-musl")
        command, extra = _zig_or_skip(static), [*FAST]
    compiling.compile_runner(out, command, target, extra)
    return [*emulator, str(out)]


def _zig_or_skip(target: targets.Target) -> list[str]:
    try:
        return compiling.zig_compiler(target)
    except KernelError:
        pytest.skip("there is no ziglang")


def run(command: list[str], file: Path, **env: str) -> dict[str, str]:
    ended = subprocess.run(
        [*command, file],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | env,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(line.split() for line in ended.stdout.splitlines())


@pytest.mark.parametrize("kind", OptimizerKind)
def test_the_runner_has_the_bits_of_python_and_no_error_under_sanitizers(
    sanitized: Path, tmp_path: Path, kind: OptimizerKind
) -> None:
    training = kernel_trainings.training(kind)
    training.write(tmp_path / "program")
    expected = PythonRun(training).run()
    assert run([str(sanitized)], tmp_path / "program") == expected


@pytest.mark.full
@pytest.mark.parametrize("level", ["-O0", "-O1", "-O3"])
def test_no_instruction_set_has_an_error_under_sanitizers(
    build: Path, tmp_path: Path, level: str
) -> None:
    runner = _compile_sanitized(build / f"all{level}", level, [])
    for kind in OptimizerKind:
        training = kernel_trainings.training(kind, steps=100)
        training.write(tmp_path / "program")
        expected = PythonRun(training).run()
        for isa in library.supported_isas():
            env = {library.VARIABLE: isa}
            assert run([str(runner)], tmp_path / "program", **env) == expected


def test_every_instruction_set_has_the_same_bits() -> None:
    training = kernel_trainings.training(steps=100)
    results = {i: PythonRun(training, i).run() for i in library.supported_isas()}
    assert len({tuple(result.items()) for result in results.values()}) == 1, results


@pytest.mark.parametrize("kind", OptimizerKind)
def test_aarch64_trains_hundreds_of_steps_to_the_same_bits(
    aarch64: list[str], tmp_path: Path, kind: OptimizerKind
) -> None:
    training = kernel_trainings.training(kind, steps=200)
    training.write(tmp_path / "program")
    assert run(aarch64, tmp_path / "program") == PythonRun(training).run()


QUICK = ("plain", "resnet", "text", "batch-norm", "clipping", "lstm", "gru", "ignored")
"""Kinds of recipes that the suite always takes; others are marked `full`."""
RECORDED = {
    kind: recipe.changed(
        {"data.augment": None} if getattr(recipe.data, "augment", None) else {}
    )
    for kind, recipe in SMALL.items()
    if kind not in ("augmented", "early")
}
"""What a file can have: neither augmentation nor early stopping."""
KINDS = [
    pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.full])
    for kind in RECORDED
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_has_its_fingerprint_without_python_and_on_aarch64(
    train: Train, aarch64: list[str], sanitized: Path, tmp_path: Path, kind: str
) -> None:
    recipe = RECORDED[kind]
    if recipe == SMALL[kind]:
        expected = GOLDEN["outcomes"][kind]["weights_sha256"]
    else:
        expected = train(recipe).weights_sha256
    file = record(recipe, tmp_path / "program")
    for command in ([str(sanitized)], aarch64):
        assert run(command, file)["weights"] == expected


ENCODER = """
class Rotated(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first, self.frozen = nn.Linear(1, 8), nn.Linear(8, 8)
        self.mix, self.last = nn.Linear(8, 24, bias=False), nn.Linear(8, classes)
        self.norm, self.again = nn.LayerNorm(8), nn.Linear(8, 8, bias=False)
        self.again.weight = self.frozen.weight
        self.register_buffer("mask", torch.ones(width, width).tril())
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = self.first(x.unsqueeze(-1))
        h = h + torch.arange(h.shape[1]).float().outer(torch.arange(8.0)).cos()
        h = self.again(nn.functional.gelu(self.frozen(self.norm(h))))
        q, k, v = self.mix(h).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(self.mask == 0, float("-inf"))
        return self.last((scores.softmax(-1) @ v).mean(1))

def build(inputs, outputs):
    return Rotated(inputs[0], outputs)
"""


def test_an_own_module_with_constants_has_its_fingerprint_on_aarch64(
    train: Train, own: Own, aarch64: list[str], sanitized: Path, tmp_path: Path
) -> None:
    """Frozen and tied weights, a mask, and positions that the forward pass makes."""
    recipe = own(ENCODER, arithmetic="portable")
    file = record(recipe, tmp_path / "program")
    expected = train(recipe, 2).weights_sha256
    for command in ([str(sanitized)], aarch64):
        assert run(command, file)["weights"] == expected


def test_constants_are_not_read_beyond_their_end(
    own: Own, sanitized: Path, tmp_path: Path
) -> None:
    file = record(own(ENCODER, arithmetic="portable"), tmp_path / "program")
    training = ProgramFile.read(file)
    cut = ProgramFile(**{**vars(training), "fixed": training.fixed[:-1]})
    cut.write(file)
    assert "an operation leaves its buffers" in _refusal(sanitized, file)


@pytest.mark.full
@pytest.mark.parametrize("compiler", ["gcc", "clang", "zig"])
@pytest.mark.parametrize("level", ["-O1", "-O3"])
def test_a_compiler_changes_no_bit(
    build: Path, tmp_path: Path, compiler: str, level: str
) -> None:
    target = targets.this_target()
    command = [compiler] if compiler != "zig" else _zig_or_skip(target)
    if compiler != "zig" and shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    runner = build / f"{compiler}{level}"
    compiling.compile_runner(runner, command, target, [level])
    for kind, recipe in RECORDED.items():
        if recipe != SMALL[kind]:
            continue
        file = record(recipe, tmp_path / kind)
        for isa in library.supported_isas():
            weights = run([str(runner)], file, **{library.VARIABLE: isa})["weights"]
            assert weights == GOLDEN["outcomes"][kind]["weights_sha256"], (kind, isa)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    training = kernel_trainings.training(steps=3)
    training.write(tmp_path / "program")
    again = ProgramFile.read(tmp_path / "program")
    for name, value in vars(training).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)
    again.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "program").read_bytes()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (0, b"samestep", "must begin with SAMESTEP"),
        (8, (9).to_bytes(8, "little"), "must have version 3, not 9"),
        (16, (9).to_bytes(8, "little"), "must have specification 1, not 9"),
        (24, (1 << 62).to_bytes(8, "little"), "ops is 4611686018427387904"),
        (48, (33).to_bytes(8, "little"), "no room for whole panels"),
        (96, (1 << 20).to_bytes(8, "little"), "ends within its"),
        (104, (2).to_bytes(8, "little"), "neither bytes, float32 nor"),
    ],
)
def test_a_damaged_header_is_refused(
    sanitized: Path, tmp_path: Path, place: int, value: bytes, says: str
) -> None:
    file = _written(tmp_path)
    content = bytearray(file.read_bytes())
    content[place : place + 8] = value
    file.write_bytes(content)
    with pytest.raises(DataError, match=says):
        ProgramFile.read(file)
    assert _refusal(sanitized, file)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_is_cut_or_longer_is_refused(
    sanitized: Path, tmp_path: Path, change: int
) -> None:
    file = _written(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:-1] if change < 0 else content + b"\0")
    with pytest.raises(DataError, match="damaged"):
        ProgramFile.read(file)
    assert "the size of the steps" in _refusal(sanitized, file)


def test_no_number_of_an_operation_leads_out_of_its_buffers(
    sanitized: Path, tmp_path: Path
) -> None:
    """Every number that is a size or a place is refused when it is far too large."""
    training = kernel_trainings.training(steps=1)
    for number, op in enumerate(training.ops):
        for i in range(3):
            ops = training.ops.copy()
            ops[number]["i"][i] = 1 << 40
            changed = ProgramFile(**{**vars(training), "ops": ops})
            changed.write(tmp_path / "program")
            says = _refusal(sanitized, tmp_path / "program")
            assert "an operation leaves its buffers" in says, (op, i)


def _written(directory: Path) -> Path:
    kernel_trainings.training(steps=2).write(directory / "program")
    return directory / "program"


def _refusal(runner: Path, file: Path) -> str:
    """Return what the runner says; it must end by itself, not by a sanitizer."""
    ended = subprocess.run(
        [runner, file], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    assert ended.stderr.startswith("The file is damaged or of another version: ")
    return ended.stderr
