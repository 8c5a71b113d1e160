"""What is installed and set, and whether it is so on both machines. Pure."""

import shlex

from samestep.doctor.findings import Finding
from samestep.doctor.observe import HostObservation
from samestep.system import conditions


LIMITING = ("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS")
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


def check(facts: HostObservation) -> list[Finding]:
    """All that is here about one machine."""
    checks = (threads, kernels, installed, extras, gpus)
    return [one(facts) for one in checks]


def threads(facts: HostObservation) -> Finding:
    """Do thread settings put all workers on one core?"""
    binding = {name: facts.variables.get(name, "") for name in BINDING}
    bad = {
        name: value
        for name, value in binding.items()
        if value and value.lower() not in ("false", "disabled", "none")
    }
    if bad:
        return Finding(
            "problem",
            "thread settings",
            _assignments(bad),
            "Each worker's first thread is bound to the first place, so all workers of "
            "this machine share one core.",
            f"unset {' '.join(bad)}",
        )
    if facts.variables.get("OMP_WAIT_POLICY", "").lower() == "active":
        return Finding(
            "warning",
            "thread settings",
            "OMP_WAIT_POLICY=active",
            "Threads that wait burn a core that another worker could use.",
            "unset OMP_WAIT_POLICY",
        )
    limiting = {n: facts.variables[n] for n in LIMITING if n in facts.variables}
    if limiting:
        return Finding(
            "warning",
            "thread settings",
            _assignments(limiting),
            "The number of threads decides bits: a recipe whose `threads` OpenMP does "
            "not give is refused.",
            f"unset {' '.join(limiting)}",
        )
    number = facts.variables.get("OMP_NUM_THREADS")
    seen = f"OMP_NUM_THREADS={number}" if number else "none in the environment"
    return Finding(
        "ok",
        "thread settings",
        f"{seen}; the recipe's `threads` decides, also where torchrun sets "
        "OMP_NUM_THREADS=1",
    )


def kernels(facts: HostObservation) -> Finding:
    """Does a variable choose other kernels, and so other bits?"""
    shown = facts.instruction_set or "this processor's own"
    set_ = {
        name: facts.variables[name]
        for name in conditions.VARIABLES
        if name in facts.variables
    }
    if not set_:
        return Finding("ok", "kernels", f"{shown}, {facts.processor}")
    return Finding(
        "warning",
        "kernels",
        f"{shown}, {facts.processor}, {_assignments(set_)}",
        "These variables decide bits: the weights differ from those of a machine that "
        "does not set them alike.",
        f"unset {' '.join(set_)}",
    )


def installed(facts: HostObservation) -> Finding:
    """What is installed; two machines are compared in `comparing.py`."""
    libraries = [f"{name} {version}" for name, version in facts.libraries.items()]
    return Finding("ok", "software", ", ".join([f"Python {facts.python}", *libraries]))


def extras(facts: HostObservation) -> Finding:
    """What is not installed, and what that costs."""
    if not facts.missing:
        return Finding("ok", "extras", "all are installed")
    missing = [f"{name}: {', '.join(some)}" for name, some in facts.missing.items()]
    wanted = f"samestep[{','.join(facts.missing)}]"
    return Finding(
        "warning",
        "extras",
        f"not installed: {'; '.join(missing)}",
        "Trainings are the same without: report is for plots and Word, tensorboard for "
        "its events, data for images and tables, export for ONNX.",
        f"pip install {shlex.quote(wanted)}",
    )


def gpus(facts: HostObservation) -> Finding:
    """Do PyTorch's build and the devices fit together?"""
    build = f"CUDA {facts.cuda}" if facts.cuda else "CPUs"
    seen = f"{facts.gpus}; PyTorch is built for {build}"
    if bool(facts.cuda) == bool(facts.gpus):
        return Finding("ok", "GPUs", seen)
    if facts.gpus:
        why = "`--device cuda` would find no GPU: this build of PyTorch has no CUDA."
    else:
        why = "Nothing breaks; a build for CPUs is smaller and is imported faster."
    return Finding(
        "warning",
        "GPUs",
        seen,
        why,
        "# choose a build: https://pytorch.org/get-started",
    )


def _assignments(variables: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())
