"""Compiles the kernels when samestep is installed, or packed into a wheel.

SAMESTEP_WHEEL=manylinux_2_17_aarch64 (or another platform tag of kernels/targets.py)
makes a wheel for that platform, on any machine, with the compiler of `ziglang`.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import packaging.tags
from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


sys.path.insert(0, str(Path(__file__).parent / "src"))

from samestep.errors import KernelError
from samestep.kernels import compiling, targets


ZIGLANG = "ziglang>=0.14"
"""A whole C compiler as a package, for machines without one."""


class KernelsHook(BuildHookInterface[BuilderConfig]):
    """Adds the library of kernels to wheels and to editable installations."""

    def dependencies(self) -> list[str]:
        """Return what compiling needs besides the machine's own compiler."""
        if "SAMESTEP_WHEEL" not in os.environ and (
            targets.architecture() not in targets.ISAS or compiling.machine_compiler()
        ):
            return []
        return [ZIGLANG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library; without a compiler samestep is installed without it.

        Recipes with portable arithmetic are then refused, with the remedy. A wheel that
        was asked for by SAMESTEP_WHEEL is not made without it.
        """
        wheel = os.environ.get("SAMESTEP_WHEEL")
        try:
            if version == "editable":
                compiling.compile_here()
            elif wheel is None:
                self._pack(targets.this_target(), compiling.find_compiler(), build_data)
                build_data["tag"] = f"py3-none-{_platform()}"
            else:
                target = targets.target_of(wheel)
                self._pack(target, compiling.zig_compiler(target), build_data)
                build_data["tag"] = f"py3-none-{wheel}"
        except KernelError as error:
            if wheel is not None:
                raise
            self.app.display_warning(f"The kernels were not compiled. {error}")

    def finalize(
        self, version: str, build_data: dict[str, Any], artifact_path: str
    ) -> None:
        """Remove what is packed by now."""
        shutil.rmtree(build_data.pop("kernels", ""), ignore_errors=True)

    def _pack(
        self, target: targets.Target, command: list[str], build_data: dict[str, Any]
    ) -> None:
        """Compile the library, and have it put into the wheel."""
        build_data["kernels"] = tempfile.mkdtemp()
        name = targets.library_path(target.system).name
        library = Path(build_data["kernels"], name)
        compiling.compile_library(library, command, target)
        build_data["force_include"][str(library)] = f"samestep/kernels/{name}"
        build_data["pure_python"] = False


def _platform() -> str:
    """Return this machine's platform tag: `linux_x86_64`, not one of `manylinux`."""
    tags = packaging.tags.platform_tags()
    return next(tag for tag in tags if not tag.startswith(("many", "musl")))
