"""What decides bits besides the recipe, its data and its code.

One list: a run goes on only under the same conditions (`resume`), machines that train
together must have the same, and the doctor looks at them. This module does not import
torch; `device.build` adds what only torch knows.
"""

import os
import platform
from collections.abc import Mapping

from samestep.system import machine


VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "GLIBC_TUNABLES",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
)
"""Environment variables by which a library chooses other kernels. Those of OpenMP that
change the number of threads are not among them: `threads.py` counts the threads."""

NONE = "none"

FOUND_BY_WORKERS = ("samples",)
"""Conditions that only the workers can see, and compare: `alike.py`."""


def of_machine() -> dict[str, str]:
    """What can be known without torch; libraries choose kernels by the processor, too.

    Python's patch releases change no arithmetic, so they may differ.
    """
    implementation = platform.python_implementation()
    version = ".".join(platform.python_version_tuple()[:2])
    return {
        "processor": machine.processor_name(),
        "libc": " ".join(platform.libc_ver()).strip() or platform.system(),
        "python": f"{implementation} {version}",
        "environment": described(os.environ),
    }


def described(variables: Mapping[str, str]) -> str:
    """Return those that decide bits and are set, `NAME=value NAME=value`, or `none`."""
    given = [f"{name}={variables[name]}" for name in VARIABLES if name in variables]
    return " ".join(given) or NONE
