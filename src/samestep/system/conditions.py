"""The conditions that decide bits besides the recipe, its data and its code.

A run is resumed only under the same conditions, machines that train together must have
the same, and the doctor shows them. This module does not import torch: `device.build`
adds the conditions that only torch knows.
"""

import os
import platform
from collections.abc import Mapping

from samestep.system import machine


VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_CPU_ISA_HINTS",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "GLIBC_TUNABLES",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_STRIPES",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG",
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG",
    "TORCHINDUCTOR_CPP_MARCH",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "TORCH_CUDNN_V8_API_DISABLED",
    "TORCH_LINEAR_FLATTEN_3D",
    "TORCH_MKLDNN_MATMUL_MIN_DIM",
    "TORCH_MKLDNN_MATMUL_MIN_SIZE",
)
"""Environment variables that make a library choose other kernels. OpenMP's variables
for the number of threads are not among them, since the threads themselves are
counted."""

NONE = "none"

FOUND_BY_WORKERS = ("samples",)
"""Conditions that only the workers can see, and compare: `verification/startup.py`."""


def of_machine() -> dict[str, str]:
    """Return the conditions that are known without torch.

    The processor is one, since libraries choose kernels by it. Python's patch releases
    change no arithmetic, so only its minor version counts.
    """
    implementation = platform.python_implementation()
    version = ".".join(platform.python_version_tuple()[:2])
    return {
        "processor": machine.processor_name(),
        "libc": " ".join(platform.libc_ver()).strip() or platform.system(),
        "python": f"{implementation} {version}",
        "environment": described(os.environ),
    }


def deciding(conditions: Mapping[str, str], *, is_portable: bool) -> dict[str, str]:
    """Return those of a machine's conditions that decide bits.

    With portable arithmetic neither its processor nor its libraries do.
    """
    ignored = {"torch", "instruction_set", *of_machine()} if is_portable else set()
    return {name: conditions[name] for name in conditions.keys() - ignored}


def described(variables: Mapping[str, str]) -> str:
    """Return the variables of the list that are set, as `A=1 B=2`, or `none`."""
    given = [f"{name}={variables[name]}" for name in VARIABLES if name in variables]
    return " ".join(given) or NONE
