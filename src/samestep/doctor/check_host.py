"""Checks of one machine: network, cores, memory, disk, software, variables. Pure."""

import shlex
from ipaddress import ip_address

from samestep.doctor.findings import Finding, judge
from samestep.doctor.observe import SHM, HostObservation
from samestep.system import conditions
from samestep.system.network_interfaces import GLOO_VARIABLE, Interface, listed


GB = 1_000_000_000
LEAST_MEMORY, LEAST_DISK, LEAST_FILES = GB, GB, 1024
DOCKERS_SHM = 64 << 20
"""Bytes of /dev/shm in a container that does not ask for more."""
MUCH_SWAP = 0.1
"""Share of the memory."""
LIMITING = ("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS")
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
UNBOUND = ("", "false", "disabled", "none")


def check(host: HostObservation, chosen: str = "", used: str = "") -> list[Finding]:
    """Run all checks of this module.

    `chosen` is the address of `--interface`, `used` the one over which this machine and
    its peer are connected; either may be empty.
    """
    return [
        _interfaces(host),
        _gloo(host, chosen, used),
        _ports(host),
        _cores(host),
        _processors(host),
        _memory(host),
        _swap(host),
        _overcommit(host),
        _shared_memory(host),
        _shm(host),
        _open_files(host),
        _disk(host),
        _threads(host),
        _kernels(host),
        _installed(host),
        _extras(host),
        _gpus(host),
    ]


def _interfaces(host: HostObservation) -> Finding:
    known = [Interface(*pair) for pair in host.addresses]
    if host.down:
        return Finding(
            "warning",
            "interfaces",
            f"{listed(known)}; switched off: {', '.join(host.down)}",
            "An interface that is off can be chosen by its address, but reaches no "
            "other machine.",
            f"sudo ip link set {shlex.quote(host.down[0])} up",
        )
    return judge(
        "interfaces",
        not all(interface.is_loopback for interface in known),
        listed(known),
        "No other machine can reach this one. Trainings on this machine alone work.",
        "ip address",
    )


def _gloo(host: HostObservation, chosen: str, used: str) -> Finding:
    if not host.gloo_address:
        return Finding(
            "problem",
            "Gloo's address",
            host.gloo_why,
            f"Gloo ends every training on several machines if {GLOO_VARIABLE} names no "
            "interface with an address.",
            f"unset {GLOO_VARIABLE}",
        )
    if chosen:
        return _gloo_on(host, chosen)
    seen = f"{host.gloo_address}: {host.gloo_why}"
    is_loopback = ip_address(host.gloo_address).is_loopback
    if host.gloo_address == used or (not used and not is_loopback):
        return Finding("ok", "Gloo's address", seen)
    entry = f" (/etc/hosts: `{host.hosts_line}`)" if host.hosts_line else ""
    name = shlex.quote(host.interface_of(used) or _first_interface(host))
    where = "on a loopback address" if is_loopback else f"not on {used}"
    return Finding(
        "warning",
        "Gloo's address",
        seen + entry,
        f"Without `--interface`, PyTorch listens there, {where}: the other machines "
        "would wait until they time out. Trainings on this machine alone work.",
        f"samestep train --interface {name} ...\nexport {GLOO_VARIABLE}={name}",
    )


def _gloo_on(host: HostObservation, chosen: str) -> Finding:
    # `--interface` sets Gloo's variable, which names an interface, not an address.
    name = host.interface_of(chosen)
    first = next(
        (address for other, address in host.addresses if other == name), chosen
    )
    if first == chosen:
        return Finding("ok", "Gloo's address", f"{chosen}, as requested with {name}")
    return Finding(
        "warning",
        "Gloo's address",
        f"{first}: the first address of {name}, not {chosen}",
        "Gloo takes the first address of an interface. The machines exchange over it, "
        "so all of them must reach it.",
        f"ip address show dev {shlex.quote(name)}",
    )


def _first_interface(host: HostObservation) -> str:
    """Return the first interface that is not a loopback, as an example."""
    known = (Interface(*pair) for pair in host.addresses)
    return next((one.name for one in known if not one.is_loopback), "eth0")


def _ports(host: HostObservation) -> Finding:
    port = host.busy_port
    taken = f"port {port} is in use, or listening on it is not allowed"
    return judge(
        "ports",
        port is None,
        "the rendezvous port is free" if port is None else taken,
        "A rendezvous cannot listen where another program does; another training may "
        "be running.",
        f"ss -ltnp 'sport = :{port}'",
    )


def _cores(host: HostObservation) -> Finding:
    seen = f"{host.usable_cores} for workers ({host.usable_cores_because})"
    if host.cpu_quota is None or host.cpu_quota >= 1:
        return Finding("ok", "cores", seen)
    return Finding(
        "warning",
        "cores",
        f"a CPU quota of {host.cpu_quota:g} cores",
        "Even a single worker is paused in the middle of its steps, and others wait.",
        "docker update --cpus 1 CONTAINER",
    )


def _processors(host: HostObservation) -> Finding:
    physical = host.physical_cores or host.logical_cpus
    seen = f"{host.logical_cpus} logical processors on {physical} cores"
    if host.allowed_cpus < host.logical_cpus:
        seen += f", {host.allowed_cpus} of them allowed"
    if host.logical_cpus > physical:
        seen += "; hyper-threads share a core's arithmetic, so auto counts cores"
    return Finding("ok", "processors", seen)


def _memory(host: HostObservation) -> Finding:
    total, limit = host.memory_bytes, host.memory_limit_bytes
    limited = f", limited to {_gb(limit)}" if limit < total else ""
    return judge(
        "memory",
        host.available_bytes >= LEAST_MEMORY,
        f"{_gb(host.available_bytes)} available of {_gb(total)}{limited}",
        "Two workers on MNIST take 0.4 GB; the kernel kills what does not fit.",
        "ps aux --sort=-rss | head",
    )


def _swap(host: HostObservation) -> Finding:
    return judge(
        "swap",
        host.swap_used_bytes <= MUCH_SWAP * host.memory_bytes,
        f"{_gb(host.swap_used_bytes)} in use",
        "A worker whose memory is on the disk makes all others wait.",
        "sudo swapoff -a && sudo swapon -a",
    )


def _overcommit(host: HostObservation) -> Finding:
    return judge(
        "overcommit",
        host.overcommit != 2,
        f"vm.overcommit_memory = {host.overcommit}",
        "Memory must be available when it is mapped. Workers are forked from a process "
        "that has imported torch, and map several times the memory that they use: the "
        "fork may fail.",
        "sudo sysctl vm.overcommit_memory=0",
    )


def _shared_memory(host: HostObservation) -> Finding:
    return judge(
        "shared memory",
        not host.no_shared_memory,
        host.no_shared_memory or "anonymous memory and semaphores between processes",
        "Workers of this machine exchange over Gloo and TCP instead: the same bits, "
        "but slower.",
        "samestep train --exchange gloo",
    )


def _shm(host: HostObservation) -> Finding:
    size = host.shm_bytes
    return judge(
        str(SHM),
        size is None or size > DOCKERS_SHM,
        "none" if size is None else _gb(size),
        "samestep does not need it, but a PyTorch DataLoader with workers in your own "
        "code does: it would end with a bus error.",
        "docker run --shm-size=1g ...",
    )


def _open_files(host: HostObservation) -> Finding:
    return judge(
        "open files",
        host.open_files >= LEAST_FILES,
        f"at most {host.open_files:,}",
        "A worker over Gloo has a connection to every other one, besides its files.",
        "ulimit -n 4096",
    )


def _disk(host: HostObservation) -> Finding:
    if not host.out_is_writable:
        return Finding(
            "problem",
            "disk",
            f"{host.out} cannot be written",
            "Runs are directories below runs/ here, unless `--out` is given.",
            "samestep train --out DIRECTORY",
        )
    return judge(
        "disk",
        host.out_free_bytes >= LEAST_DISK,
        f"{_gb(host.out_free_bytes)} free in {host.out}",
        "A run keeps three checkpoints. A full disk costs them, but not the training.",
        "du -s runs/* | sort -n | tail",
    )


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:,.0f} GB"


def _threads(host: HostObservation) -> Finding:
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


def _kernels(host: HostObservation) -> Finding:
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


def _installed(host: HostObservation) -> Finding:
    libraries = [f"{name} {version}" for name, version in host.libraries.items()]
    return Finding("ok", "software", ", ".join([f"Python {host.python}", *libraries]))


def _extras(host: HostObservation) -> Finding:
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


def _gpus(host: HostObservation) -> Finding:
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
