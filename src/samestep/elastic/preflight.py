"""The checks of each machine before a training, and their comparison with others."""

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samestep.api import train
from samestep.api.resolving import resolved
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.elastic import node_state
from samestep.elastic.consensus import NodeStatus
from samestep.elastic.gathering import Meeting
from samestep.elastic.node_state import Held
from samestep.errors import RunError, SamestepError
from samestep.models import device
from samestep.output import fence
from samestep.output.run import LOOP_FILE, RECIPE_FILE
from samestep.output.run_writer import LOCK_FILE
from samestep.supervisor.resume import (
    check_conditions,
    find_start,
    flatten,
    is_finished,
)
from samestep.system import machine, network_interfaces
from samestep.system.conditions import deciding
from samestep.system.network_interfaces import Interface
from samestep.user_code.references import check_callbacks


TOGETHER = (
    "exchange",
    "balance",
    "probe",
    "verify",
    "ledger",
    "checkpoint_steps",
    "keep_checkpoints",
)
"""Fields of the placement that decide when all workers exchange what: where they
differ, some would wait for ever, or add up numbers that do not belong together."""


@dataclass(frozen=True)
class Request:
    """The request of the command line, the same on all machines."""

    run: Path
    recipe: Recipe | None
    """None: the recipe of the run, which is resumed."""
    parts: Mapping[str, str]
    """User code named on the command line: part -> `module:function`."""
    placement: Placement
    interface: str | None
    callbacks: Sequence[str] = ()
    trackers: Sequence[str] = ()
    with_report: bool = True
    epochs: int | None = None
    allow_different_numerics: bool = False


@dataclass(frozen=True)
class Prepared:
    """The results of a leader's checks on its machine."""

    recipe: Recipe
    placement: Placement
    notice: str | None
    described: Mapping[str, Any]
    """The data, as recorded in the run."""
    checksums: Mapping[str, str]
    """Checksums of data and of user code."""
    build: Mapping[str, str]
    """The checksums and everything else that decides bits: `system/conditions.py`."""
    interface: Interface
    """The network between the machines; empty if none was named."""
    held: Held | None
    warnings: list[str]


@dataclass
class Comparison:
    """One leader's part; all leaders make the same calls in the same order."""

    request: Request
    meeting: Meeting
    token: str = field(default_factory=lambda: f".node-{secrets.token_hex(8)}")

    def recipe(self) -> Recipe:
        """Return the requested recipe, or that of the run on a machine that has it."""
        request = self.request
        if request.recipe is not None:
            return request.recipe
        recipe, error = None, ""
        if any((request.run / name).exists() for name in (RECIPE_FILE, LOOP_FILE)):
            try:
                recipe = find_start(request.run, request.epochs, request.parts).recipe
            except SamestepError as failed:
                error = str(failed)
        answer = {"recipe": recipe.to_dict() if recipe else None, "error": error}
        answers = self.meeting.all_gather("recipe", answer)
        errors = [one["error"] for one in answers if one["error"]]
        recipes = [one["recipe"] for one in answers if one["recipe"]]
        if errors or not recipes:
            raise RunError(
                " ".join(errors) or f"None of the machines has a run {request.run}."
            )
        return recipe or Recipe.from_dict(recipes[0])

    def compare(self, recipe: Recipe) -> tuple[Prepared | None, list[NodeStatus]]:
        """Return the results of this machine, None after an error, and all statuses."""
        host, prepared = socket.gethostname(), None
        try:
            prepared = self._prepare(recipe)
        except SamestepError as error:
            status = NodeStatus(host, error=str(error))
            self._sees(is_fine=False)
        else:
            status = self._status(prepared, host, self._sees(is_fine=True))
        statuses = self.meeting.all_gather("status", asdict(status))
        return prepared, [NodeStatus(**fields) for fields in statuses]

    def _prepare(self, recipe: Recipe) -> Prepared:
        request, topology = self.request, self.meeting.topology
        check_callbacks(request.callbacks)
        where = request.placement.model_copy(update={"workers": topology.workers})
        recipe, placement, _, notice = resolved(
            recipe, where, request.parts, device.gpus
        )
        _check_directory(request.run, recipe, request.recipe is None)
        described, checksums = train.described(recipe)
        build = device.build() | checksums
        if placement.device != "cpu":
            build["device"] = f"{placement.device}: {device.gpus().title}"
        held, warnings = node_state.newest(request.run), list[str]()
        if held is not None and not request.allow_different_numerics:
            then = held.recipe, held.build
            warnings = check_conditions(then, (recipe, build))
        named = request.interface or os.environ.get(network_interfaces.GLOO_VARIABLE)
        interface = network_interfaces.resolve(named) if named else Interface("", "")
        return Prepared(
            recipe,
            placement,
            notice,
            described,
            checksums,
            build,
            interface,
            held,
            warnings,
        )

    def _sees(self, is_fine: bool) -> list[int]:
        """Return the nodes that share this run directory: each leaves a file there."""
        directory = self.request.run / node_state.DIRECTORY
        if is_fine:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / self.token).touch()
        tokens = self.meeting.all_gather("token", self.token if is_fine else "")
        return [n for n, t in enumerate(tokens) if t and (directory / t).exists()]

    def _status(self, prepared: Prepared, host: str, sees: list[int]) -> NodeStatus:
        held, placement = prepared.held, prepared.placement
        fields = flatten(prepared.recipe.to_dict())
        fields.pop("init.weights", None)  # their SHA-256 is another field
        return NodeStatus(
            host=host,
            workers=self.meeting.topology.local_workers,
            conditions={
                **{f"recipe {name}": str(value) for name, value in fields.items()},
                **deciding(prepared.build, is_portable=prepared.recipe.is_portable),
                "samestep": machine.checksum_of_sources(),
                **{option(name): str(getattr(placement, name)) for name in TOGETHER},
            },
            generation=fence.number_in(self.request.run),
            step=held.state.step if held else -1,
            checksum=held.checksum if held else 0,
            ledgers=held.recorded if held else {},
            sees=sees,
            interface=prepared.interface.name,
            address=prepared.interface.address,
            interfaces=network_interfaces.listed(network_interfaces.all_interfaces()),
        )


def option(name: str) -> str:
    """Return how a field of the placement is given on the command line."""
    return f"--{name.replace('_', '-')}"


def _check_directory(run: Path, recipe: Recipe, is_resumed: bool) -> None:
    """Raise RunError if this job may not write to the directory."""
    file = run / RECIPE_FILE
    if not file.exists():
        # A writer that ended before it wrote anything leaves these.
        ours = {node_state.DIRECTORY, fence.FILE, LOCK_FILE, "logs"}
        names = {path.name for path in run.iterdir()} if run.exists() else set()
        if any(n not in ours and not n.startswith(fence.TAKEN) for n in names):
            raise RunError(
                f"A run never overwrites anything, and {run} exists. Choose another "
                "directory with `--out`, or remove this one."
            )
        return
    # torchrun may start the workers of a job again after their end.
    is_own = fence.writer_of(run) == machine.name_of_process(os.getppid())
    if is_finished(run) and not is_resumed and not is_own:
        raise RunError(f"{run} is finished. Choose another directory with `--out`.")
    if not is_resumed and Recipe.load(file, warn=False).digest != recipe.digest:
        raise RunError(
            f"A run continues under its own recipe, and {run} has another one. Choose "
            "another directory with `--out`."
        )
