"""Loading the kernels: which instruction set, and what is refused before a training."""

import re
import subprocess
import sys
from collections.abc import Callable
from ctypes import sizeof
from pathlib import Path

import pytest

from samestep import KernelError
from samestep.kernels import compiling, interface, library, targets


HEADER = "".join(
    (targets.SOURCES / name).read_text() for name in ("operations.h", "samestep.h")
)
# A library that says what the macros say, and has kernels for no processor.
FAKE = """
#include <stddef.h>
int samestep_specification(void) { return SPECIFICATION; }
int samestep_interface(void) { return INTERFACE; }
const char *samestep_sources(void) { return SOURCES; }
const void *samestep_kernels(const char *isa) { return isa ? NULL : NULL; }
static const char *const names[] = {"v4", "v3", NULL};
const char *const *samestep_isas(void) { return names; }
"""
Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Make the loader find a library that says something else."""
    command = compiling.machine_compiler()
    if command is None:
        pytest.skip("there is no C compiler")

    def make(**says: object) -> None:
        (tmp_path / "fake.c").write_text(FAKE)
        defaults = {
            "SPECIFICATION": interface.SPECIFICATION,
            "INTERFACE": interface.INTERFACE,
            "SOURCES": f'"{targets.sources_digest()}"',
        }
        macros = [f"-D{name}={value}" for name, value in (defaults | says).items()]
        paths = ["-o", f"{tmp_path}/fake.so", f"{tmp_path}/fake.c"]
        subprocess.run([*command, "-shared", "-fPIC", *macros, *paths], check=True)
        monkeypatch.setattr(library, "library_path", lambda: tmp_path / "fake.so")
        monkeypatch.setattr(library, "architecture", lambda: "x86_64")
        monkeypatch.delenv(library.VARIABLE, raising=False)

    return make


def test_the_best_instruction_set_is_chosen_or_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    best, *others = library.supported_isas()
    assert library.load_kernels().isa == best.encode()
    for isa in others:
        assert library.load_kernels(isa).isa == isa.encode()
        monkeypatch.setenv(library.VARIABLE, isa)
        assert library.load_kernels().isa == isa.encode()


@pytest.mark.parametrize(
    ("isa", "says"),
    [
        ("sse", "must be one of v2, v3, v4, neon, not 'sse'"),
        ("V4", r"not 'V4'\. Did you mean `v4`"),
        ("neon", "is not an instruction set of x86_64, which has v4, v3: unset it"),
        ("v2", "is not an instruction set of x86_64"),
        ("v4", "needs a processor with that instruction set, and this one lacks it"),
    ],
)
def test_an_instruction_set_that_is_not_there_is_refused(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, isa: str, says: str
) -> None:
    fake()
    monkeypatch.setenv(library.VARIABLE, isa)
    with pytest.raises(KernelError, match=says):
        library.load_kernels()


def test_a_processor_without_any_of_them_is_refused(fake: Fake) -> None:
    fake()
    with pytest.raises(
        KernelError, match=r'has none of them .* `arithmetic = "torch"`'
    ):
        library.load_kernels()


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({"SPECIFICATION": 9}, "specification 1 and interface 4, but .* has 9 and 4"),
        ({"INTERFACE": 9}, "specification 1 and interface 4, but .* has 1 and 9"),
        ({"SOURCES": '"0"'}, "is of others: they have changed since"),
    ],
)
def test_a_library_of_another_version_is_refused(
    fake: Fake, says: dict[str, object], expected: str
) -> None:
    fake(**says)
    with pytest.raises(KernelError, match=expected) as caught:
        library.load_kernels()
    assert "run `python -m samestep.kernels.compiling`" in str(caught.value)


def test_without_a_library_the_remedy_depends_on_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "none.so")
    with pytest.raises(KernelError, match=r"has\snone: .*`pip install ziglang`"):
        library.load_kernels()
    monkeypatch.setattr(library, "architecture", lambda: "riscv64")
    with pytest.raises(KernelError, match='not for riscv64: use `arithmetic = "torch"'):
        library.load_kernels()


def test_a_damaged_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "damaged.so")
    with pytest.raises(KernelError, match=r"cannot be loaded: .*damaged\.so"):
        library.load_kernels()


def test_loading_does_not_import_torch() -> None:
    code = (
        "import sys; from samestep.kernels.library import load_kernels; "
        "load_kernels(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _structure(name: str) -> list[str]:
    """Return the names of a structure's fields in the header."""
    text = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)
    (body,) = re.findall(rf"typedef struct \{{([^{{}}]*)\}} {name};", text)
    fields: list[str] = []
    for declaration in body.split(";")[:-1]:
        if pointer := re.search(r"\(\*(\w+)\)\(", declaration):
            fields.append(pointer[1])
        else:
            fields += re.findall(r"(\w+)(?:\[\w+\])?(?=,|$)", declaration.strip())
    return fields


@pytest.mark.parametrize("name", ["Op", "Call", "Optimizer", "Kernels"])
def test_the_structures_have_the_fields_of_the_header(name: str) -> None:
    fields = getattr(interface, name)._fields_
    assert [field[0] for field in fields] == _structure(name)


def test_the_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    """The compiler computes the header's, among them the sizes of structures."""
    expected = {f"OP_{kind.name}": kind.value for kind in interface.OpKind}
    expected |= {f"OP_{flag.name}": flag.value for flag in interface.OpFlag}
    expected |= {kind.name: kind.value for kind in interface.OptimizerKind}
    expected["NUM_OPS"] = len(interface.OpKind)
    expected["SAMESTEP_SPECIFICATION"] = interface.SPECIFICATION
    expected["SAMESTEP_INTERFACE"] = interface.INTERFACE
    for name in ("Op", "Call", "Optimizer", "Kernels"):
        size = sizeof(getattr(interface, name))
        expected[f"(int)sizeof({name})"] = size
    claims = [f'_Static_assert({n} == {v}, "");\n' for n, v in expected.items()]
    (tmp_path / "claims.c").write_text('#include "samestep.h"\n' + "".join(claims))
    command = compiling.machine_compiler()
    if command is None:
        pytest.skip("there is no C compiler")
    flags = ["-fsyntax-only", f"-I{targets.SOURCES}"]
    subprocess.run([*command, *flags, tmp_path / "claims.c"], check=True)
