"""The run directory of a loop, which the worker of rank 0 writes.

It is that of a training, with what a loop can know: means, times and fingerprints. The
model, the data and the loss are the script's, so there is no recipe. Every worker
measures its own time; all of them call what gathers it.
"""

import os
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from samestep.data.batches import GlobalBatch
from samestep.errors import OwnCodeError, RunError
from samestep.files import untrusted
from samestep.loop.position import Position
from samestep.loop.snapshots import PATIENCE_SECONDS
from samestep.messages.training import Restarted
from samestep.output.fence import writer_of
from samestep.output.run import LOOP_FILE, Settings
from samestep.output.run_writer import RunWriter, new_directory
from samestep.output.schema import Step
from samestep.system import log, machine
from samestep.system.json_values import JsonObject


Fingerprint = Callable[[], str]
NAMES = {"loss", "accuracy", "lr", "noise_scale"}
"""Fields of a record that are measured, so a script may measure them, too."""
RESERVED = {"type", *Step.model_fields} - NAMES


@dataclass
class Spent:
    """What this worker has done for a while."""

    samples: int = 0
    """Of all workers."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class Recording:
    """What the workers of a loop record of it: nothing without a directory."""

    def __init__(
        self,
        out: str | Path | None,
        recipe: JsonObject,
        placement: JsonObject,
        position: Position,
        rank: int,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        """All workers: prepare. The directory is made before the first step."""
        self._started = self._mark = time.monotonic()
        self._out = Path(out) if out is not None else None
        self._settings = Settings(
            recipe, {**placement, "out": str(out)}, file=LOOP_FILE
        )
        self._position, self._is_writer, self._gather = position, rank == 0, gather
        self._writer: RunWriter | None = None
        self._is_restored = False
        self._epoch, self._records = 1, 0
        self._names: dict[str, None] = {}
        self._since_row, self._since_epoch = Spent(), Spent()

    def note(self, **fields: Any) -> None:
        """Add what decides the result, as it was at first."""
        for name, value in fields.items():
            if value is not None:
                self._settings.recipe.setdefault(name, value)

    def check(self, names: Iterable[str]) -> None:
        """Raise OwnCodeError unless the names can stand in a record."""
        for name in names if self._out is not None else ():
            if name in RESERVED or not name.isidentifier():
                raise OwnCodeError(
                    "The means of a run stand in its records under identifiers that "
                    f"no other field has; `add` received `{name}`. Rename it."
                )

    def begin_epoch(self, epoch: int, start: int) -> None:
        """Begin with the time of an epoch, or go on with it after `start` steps."""
        self._epoch, self._mark = epoch + 1, time.monotonic()
        if start == 0:
            self._since_epoch = Spent()

    def step(
        self, batch: GlobalBatch, compute: Callable[[GlobalBatch], Iterator[Any]]
    ) -> Iterator[Any]:
        """Yield the micro-batches of a step, and measure its phases."""
        self._open()
        self.lap("other")
        fetch = partial(self._measured, batch.fetch)
        for micro_batch in compute(batch._replace(fetch=fetch)):
            yield micro_batch
            self.lap("compute")
        self.lap("exchange")
        for spent in (self._since_row, self._since_epoch):
            spent.samples += batch.size

    def _measured(self, fetch: Callable[[int], Any], micro_batch: int) -> Any:
        self.lap("exchange")
        fetched = fetch(micro_batch)
        self.lap("data")
        return fetched

    def lap(self, phase: str) -> None:
        """Count the time since the last call for a phase."""
        now = time.monotonic()
        for spent in (self._since_row, self._since_epoch):
            spent.add(phase, now - self._mark)
        self._mark = now

    def add_means(self, means: dict[str, float]) -> None:
        """All workers: record means of what was added since the last ones."""
        if self._out is None or not means:
            return
        spent, self._since_row = self._since_row, Spent()
        self._names |= dict.fromkeys(means)
        self._add("step", {**means, **self._use(spent), "own_metrics": list(means)})

    def end_epoch(self, fingerprint: Fingerprint) -> None:
        """All workers: record the epoch that has ended."""
        self.lap("other")
        if self._out is None:
            return
        use, sha256 = self._use(self._since_epoch), fingerprint()
        phases = self._since_epoch.seconds
        if "workers" in use:
            phases = _mean(use["workers"])
        record = {"seconds": sum(phases.values()), **use, "seconds_by_phase": phases}
        self._add("epoch", {**record, "weights_sha256": sha256})

    def _use(self, spent: Spent) -> JsonObject:
        """All workers: return speed and phases, if any step was taken."""
        if not spent.samples:
            return {}
        workers = self._gather(spent.seconds)
        phases = _mean(workers)
        total = sum(phases.values())
        return {
            "samples_per_second": spent.samples / total,
            "workers": workers,
            "communication_share": phases["exchange"] / total,
        }

    def _add(self, kind: str, record: JsonObject) -> None:
        self._open()
        self._records += 1
        if self._writer is not None:
            at = {"epoch": self._epoch, "step": self._position.steps}
            self._writer.add(kind, at | record)

    def close(self, fingerprint: Fingerprint) -> None:
        """All workers: end the run with its result. Raises OutputError."""
        if self._out is None:
            return
        sha256 = fingerprint()
        self._open()
        if self._writer is not None:
            names = list(self._names)
            with self._writer as writer:
                writer.close("finished", weights_sha256=sha256, own_metrics=names)
        self._out = self._writer = None

    def state_dict(self) -> JsonObject:
        """Return what another process goes on with."""
        if self._out is None:
            return {}
        since = {"row": asdict(self._since_row), "epoch": asdict(self._since_epoch)}
        return {"run": {"records": self._records, "since": since}}

    def load_state_dict(self, state: JsonObject | None) -> None:
        """Go on with a state; None is that of a loop without a directory."""
        if state is None:
            return
        self._is_restored, self._records = True, state["records"]
        self._since_row = Spent(**state["since"]["row"])
        self._since_epoch = Spent(**state["since"]["epoch"])

    def _open(self) -> None:
        """Rank 0: make the directory, or go on with it, if that is not done yet.

        Raises RunError, OutputError.
        """
        if self._out is None or self._writer is not None or not self._is_writer:
            return
        own, *earlier = _writers()
        is_begun = (self._out / LOOP_FILE).is_file()
        is_begun = is_begun and (self._is_restored or writer_of(self._out) in earlier)
        if is_begun:
            self._check_settings(self._out / LOOP_FILE)
        else:
            new_directory(self._out, "", option="out=")
        generation = None, own
        self._writer = writer = RunWriter.reopen(
            self._out, self._settings, self._started, generation, PATIENCE_SECONDS
        )
        writer.warn = _warn
        steps = self._position.steps
        records = writer.rewind_to(steps, self._records)
        self._records = len(records)
        self._names = dict.fromkeys(
            n for r in records for n in r.get("own_metrics", ())
        )
        writer.start("resumed" if is_begun else "started", {})
        if earlier:
            number, workers = len(earlier), self._settings.placement["workers"]
            writer.receive(Restarted(number=number, step=steps, workers=workers))
            writer.restarts = number

    def _check_settings(self, file: Path) -> None:
        """Raise RunError if the run was begun with others."""
        now = self._settings.recipe
        try:
            then = tomllib.loads(untrusted.read_text(file))
        except (OSError, ValueError) as error:
            raise RunError(f"{file} cannot be read: {error}.") from None
        changed = [
            f"{name} {then[name]} then, {now[name]} now"
            for name in sorted(then.keys() & now.keys())
            if then[name] != now[name]
        ]
        if changed:
            raise RunError(
                f"A run goes on with what it was begun with; of {file.parent} these "
                f"differ: {'; '.join(changed)}. Restore them, or choose another `out=`."
            )


def _writers() -> list[str]:
    """Return a name for this process, then those of the ones that it replaces.

    torchrun's agent, their parent, starts the workers again after a failure.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is None:
        return [machine.name_of_process(os.getpid())]
    agent = machine.name_of_process(os.getppid())
    return [f"{agent}, start {number}" for number in range(int(restarts), -1, -1)]


def _mean(workers: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean over the workers of the seconds of each phase."""
    phases = dict.fromkeys(phase for worker in workers for phase in worker)
    return {
        phase: sum(worker.get(phase, 0.0) for worker in workers) / len(workers)
        for phase in phases
    }


def _warn(text: str) -> None:
    with log.shown_on_stderr():
        log.logger.warning(text)
