"""Checks of the software and the environment variables of one machine. Pure."""

import shlex

from samestep.doctor.findings import Finding, judge
from samestep.doctor.observe import HostObservation
from samestep.system import conditions


LIMITING = ("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS")
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
UNBOUND = ("", "false", "disabled", "none")


def check(host: HostObservation) -> list[Finding]:
    """Run all checks of this module."""
    return [threads(host), kernels(host), installed(host), extras(host), gpus(host)]


def threads(host: HostObservation) -> Finding:
    """Check that no thread setting puts all workers on one core."""
    variables = host.variables
    binding = {n: variables[n] for n in BINDING if n in variables}
    binding = {n: v for n, v in binding.items() if v.lower() not in UNBOUND}
    if binding:
        return Finding(
            "problem",
            "thread settings",
            _assignments(binding),
            "Each worker's first thread is bound to the first place, so all workers of "
            "this machine share one core.",
            f"unset {' '.join(binding)}",
        )
    if variables.get("OMP_WAIT_POLICY", "").lower() == "active":
        return Finding(
            "warning",
            "thread settings",
            "OMP_WAIT_POLICY=active",
            "Waiting threads keep a core busy that another worker could use.",
            "unset OMP_WAIT_POLICY",
        )
    limiting = {n: variables[n] for n in LIMITING if n in variables}
    if limiting:
        return Finding(
            "warning",
            "thread settings",
            _assignments(limiting),
            "The number of threads affects the result: a recipe whose `threads` OpenMP "
            "does not provide is refused.",
            f"unset {' '.join(limiting)}",
        )
    number = variables.get("OMP_NUM_THREADS")
    seen = f"OMP_NUM_THREADS={number}" if number else "none in the environment"
    rule = "the recipe's `threads` decides, also where torchrun sets OMP_NUM_THREADS=1"
    return Finding("ok", "thread settings", f"{seen}; {rule}")


def kernels(host: HostObservation) -> Finding:
    """Check that no variable selects other kernels, and so other bits."""
    names = [name for name in conditions.VARIABLES if name in host.variables]
    assignments = _assignments({name: host.variables[name] for name in names})
    seen = [host.instruction_set or "this processor's own", host.processor, assignments]
    return judge(
        "kernels",
        not names,
        ", ".join(filter(None, seen)),
        "These variables affect the result: the weights differ from those of a machine "
        "without the same settings.",
        f"unset {' '.join(names)}",
    )


def installed(host: HostObservation) -> Finding:
    """Report the versions; `check_peer` compares those of two machines."""
    libraries = [f"{name} {version}" for name, version in host.libraries.items()]
    return Finding("ok", "software", ", ".join([f"Python {host.python}", *libraries]))


def extras(host: HostObservation) -> Finding:
    """Check which extras are not installed."""
    missing = [f"{name}: {', '.join(some)}" for name, some in host.missing.items()]
    package = f"samestep[{','.join(host.missing)}]"
    return judge(
        "extras",
        not missing,
        f"not installed: {'; '.join(missing)}" if missing else "all are installed",
        "Trainings work without them: report is for plots and Word, tensorboard for "
        "its events, data for images and tables, export for ONNX.",
        f"pip install {shlex.quote(package)}",
    )


def gpus(host: HostObservation) -> Finding:
    """Check that PyTorch's build fits the devices."""
    build = f"CUDA {host.cuda}" if host.cuda else "CPUs"
    why = "Everything works; a build for CPUs is smaller and faster to import."
    if host.gpus:
        why = "`--device cuda` would find no GPU: this build of PyTorch has no CUDA."
    return judge(
        "GPUs",
        bool(host.cuda) == bool(host.gpus),
        f"{host.gpus}; PyTorch is built for {build}",
        why,
        "# choose a build: https://pytorch.org/get-started",
    )


def _assignments(variables: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())
