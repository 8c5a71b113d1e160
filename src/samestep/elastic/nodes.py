"""`samestep train --nodes`: run this machine's part of a training on several.

Prints the torchrun command, which a user could type as well, runs it, and translates
its end into an exit code. Does not import torch.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from samestep.config.recipe import Recipe
from samestep.elastic import node_state
from samestep.errors import (
    Interrupted,
    OutputError,
    PlacementError,
    RunError,
    TrainingError,
    UsageError,
)
from samestep.output import events
from samestep.output.json_lines import whole_lines
from samestep.state import checkpoint
from samestep.supervisor.resume import flatten, is_finished
from samestep.system import machine, network_interfaces
from samestep.system.json_values import JsonObject
from samestep.system.log import logger
from samestep.system.signals import EXIT_CODES, Stop, stop_on_signals


POLL_SECONDS = 0.2
LAST_CALL_SECONDS = 2
"""Seconds to wait for more machines once there are enough, unless all that were there
before have joined again; torchrun's default is 30."""
SHUTDOWN_SECONDS = 15
"""Seconds until a worker that does not end is killed; torchrun's default is 30. Workers
take 5 s and the time to write a checkpoint; a stopped process (SIGSTOP) never ends."""
MONITOR_SECONDS = 0.25
"""Seconds between two looks of torchrun at the workers and at the other machines."""
RDZV_ID = "samestep"
"""The job's name unless `--rdzv-id` is given: an endpoint serves one job."""
JOB = "SAMESTEP_JOB"
"""The environment variable with the recipe; the rendezvous refuses other recipes."""
REFUSED = "refused"
"""Stands for an exit code in torchrun's error file: no worker was started."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""The signals that torchrun passes on to the workers."""
OURS = (
    "nodes",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "workers",
    "max_restarts",
)
"""Options that become torchrun's own."""


def run(path: Path | None, recipe: Recipe | None) -> None:
    """Run the current command under torchrun, until it ends.

    `recipe` is None if it is that of the run. Raises UsageError, TrainingError,
    Interrupted; the output of torchrun is above the error.
    """
    context = click.get_current_context()
    if path is None:
        raise UsageError(
            "All machines, and all their restarts, use one directory: name it with "
            "`--out`."
        )
    if context.info_name == "train" and is_finished(path):
        raise RunError(f"{path} is finished. Choose another directory with `--out`.")
    given = context.params
    workers = given["workers"]
    if workers == "auto":
        workers = _auto_workers(recipe, given["nodes"])
    _check_endpoint(given["rdzv_endpoint"])
    command = _command(context, workers)
    logger.info(shlex.join(command))
    with tempfile.TemporaryDirectory(prefix="samestep-") as directory:
        error_file = Path(directory) / "error.json"
        variables = {
            # Avoids a warning of torchrun; the recipe sets the threads.
            "OMP_NUM_THREADS": "1",
            # Torch would print a line for every peer address without a host name.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **os.environ,
            JOB: _job_of(recipe),
            # Otherwise every worker would have to start itself again to set it.
            "PYTHONHASHSEED": "0",
            "TORCHELASTIC_ERROR_FILE": str(error_file),
        }
        with stop_on_signals() as stop:
            code = _run(command, variables, stop)
            in_etcd = given["rdzv_backend"] != "samestep"
            _judge(code, stop, _read(error_file), path, in_etcd)


def _check_endpoint(endpoint: str) -> None:
    """Check the form of HOST:PORT and that the host is known. Raises PlacementError."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise PlacementError(
            "An endpoint is HOST:PORT with a port from 1 to 65535, such as "
            f"h1:29400; received `{endpoint}`."
        )
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise PlacementError(
            f"The host of an endpoint is one of the machines; `{host}` cannot be "
            f"resolved: {error.strerror}. Use its address, or add its name to "
            "/etc/hosts."
        ) from None


def _job_of(recipe: Recipe | None) -> str:
    """Return the recipe as JSON, to compare between machines; empty if unknown here."""
    fields = flatten(recipe.to_dict()) if recipe else {}
    fields.pop("init.weights", None)  # a path, whose SHA-256 is compared later
    return json.dumps(fields, sort_keys=True) if fields else ""


def _command(context: click.Context, workers: int) -> list[str]:
    """Return the torchrun command for this machine. Raises PlacementError."""
    given = context.params
    conf = [f"last_call_timeout={LAST_CALL_SECONDS}"] if ":" in given["nodes"] else []
    if given["rdzv_backend"] != "samestep":
        conf.append(f"store={given['rdzv_backend']}")
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", given["nodes"], "--nproc-per-node", str(workers)),
        *("--max-restarts", str(given["max_restarts"])),
        *("--rdzv-backend", "samestep", "--rdzv-endpoint", given["rdzv_endpoint"]),
        *("--rdzv-id", given["rdzv_id"] or RDZV_ID),
        *(["--rdzv-conf", ",".join(conf)] if conf else []),
        *("--local-addr", network_interfaces.resolve(given["interface"]).address),
        *("--signals-to-handle", SIGNALS),
        *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
        *("--monitor-interval", str(MONITOR_SECONDS)),
        *("-m", "samestep.worker", *_arguments(context)),
    ]


def _arguments(context: click.Context) -> list[str]:
    """Return the words of the current command line, without those for torchrun."""
    words = [str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if not given or name in OURS:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif isinstance(parameter, click.Option):
            words += _option(parameter, value)
    return words


def _option(option: click.Option, value: Any) -> list[str]:
    if option.is_flag:
        return [option.opts[0] if value else option.secondary_opts[0]]
    if option.multiple:
        return [word for one in value for word in (option.opts[0], str(one))]
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [option.opts[0], text]


def _auto_workers(recipe: Recipe | None, nodes: str) -> int:
    """Return one worker per core, if there are as many micro-batches."""
    cores = machine.usable_cores()[0]
    if recipe is None:
        return cores
    most_nodes = int(nodes.rpartition(":")[2])  # of `N` or `MIN:MAX`
    return max(1, min(cores, recipe.micro_batches // most_nodes))


def _run(command: Sequence[str], variables: dict[str, str], stop: Stop) -> int:
    """Run torchrun in a session of its own, so that it gets each signal once."""
    process = subprocess.Popen(  # noqa: S603
        command, env=variables, start_new_session=True
    )
    is_signalled = False
    try:
        while process.poll() is None:
            if stop.number is not None and not is_signalled:
                process.send_signal(stop.number)
                is_signalled = True
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    finally:  # by a second signal; the workers notice that torchrun is gone
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return process.returncode


def _read(error_file: Path) -> tuple[str, Any]:
    """Return the message of the first failure, and a worker's exit code if it had one.

    torchrun writes this file: torch.distributed.elastic.multiprocessing.errors.
    """
    try:
        message = json.loads(error_file.read_text())["message"]
        return str(message["message"]), message.get("errorCode")
    except (OSError, ValueError, KeyError, TypeError):
        return "", None


def _judge(
    code: int, stop: Stop, failure: tuple[str, Any], run: Path, in_etcd: bool
) -> None:
    """Raise the error that explains how torchrun ended, if it failed."""
    text, worker_code = failure
    if code == 0:
        return
    if worker_code == REFUSED:
        raise PlacementError(text)
    wrong, is_saved = _wrong_worker(run), _is_saved(run)
    is_lost = text and worker_code is None  # torchrun's own: the endpoint is gone
    how, exit_code = wrong or text, worker_code
    resume = f"go on with `samestep resume {run}`, or start this command again"
    if stop.number is not None:
        how, exit_code = "stopped", stop.exit_code
    elif is_lost and not in_etcd and not wrong:
        resume += ". With `--rdzv-backend etcd-v2` any machine may be lost"
    if exit_code in EXIT_CODES.values() and not is_saved:
        raise OutputError(  # a scheduler would requeue it for ever
            f"{how.rstrip('.')}. Nothing was saved in {run}, so there is nothing to go "
            "on with: start this command again."
        )
    if exit_code in EXIT_CODES.values() or (is_lost and is_saved):
        raise Interrupted(f"{how}; {resume}", exit_code or 75)
    if worker_code == PlacementError.exit_code:
        raise PlacementError("A worker refused to start; its reason is above.")
    why = wrong or f"torchrun ended with exit code {code}; the reason is above"
    raise TrainingError(f"{why}.")


def _wrong_worker(run: Path) -> str:
    """Return who was wrong, if that ended the last generation of workers, or ""."""
    happened = list(events.read(whole_lines(run / "events.jsonl")))
    if not events.wrong_workers(takewhile(_is_of_last_generation, reversed(happened))):
        return ""
    wrong = events.wrong_workers(happened)
    host, step = wrong[-1].get("host"), wrong[-1].get("step")
    times = [each.get("host") for each in wrong].count(host)
    return (
        f"Worker {wrong[-1].get('worker')} on {host} was wrong in step {step}. Workers "
        f"there were wrong {times} time{'s' if times > 1 else ''}, and no restart is "
        f"left (`--max-restarts`): replace {host}"
    )


def _is_of_last_generation(event: JsonObject) -> bool:
    return event.get("event") != "generation"


def _is_saved(run: Path) -> bool:
    """Return whether a run has a checkpoint, or snapshots of this or another host."""
    snapshots = (run / node_state.DIRECTORY).glob(f"*/*/{node_state.ABOUT}")
    return bool(checkpoint.steps(checkpoint.directory_of(run)) or any(snapshots))
