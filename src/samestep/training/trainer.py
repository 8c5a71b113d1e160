"""The parts of one worker of a training, each with only what it needs.

`training.build` puts them together, `training.train` runs them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from samestep.config.recipe import Recipe
from samestep.core.balancer import Balancer, Change, random_ownership
from samestep.core.lr_range import LrRange
from samestep.core.lr_schedule import CustomFactor, rate_of
from samestep.core.ownership import Share, contiguous, lengths
from samestep.core.plan import Plan, derive_seed
from samestep.core.progress import Progress
from samestep.core.speeds import StepWindow
from samestep.core.straggler import Straggler
from samestep.core.topology import Topology
from samestep.data.augment import Mixed
from samestep.data.dataset import Dataset
from samestep.data.plans import StreamPlan
from samestep.data.prefetch import HelperProcess, Prefetcher
from samestep.data.pytree import Nested
from samestep.exchange import Exchange
from samestep.exchange.autograd import AutogradPasses
from samestep.messages.job import Setup
from samestep.messages.training import Message, WorkerWarning
from samestep.models.device import Device
from samestep.optim.averaging import WeightAverages
from samestep.optim.custom import CustomOptimizer
from samestep.optim.gradients import TORCH_NORMS, Norms
from samestep.optim.optimizer import Optimizer
from samestep.portable.passes import RecordedPasses
from samestep.state.flat import Flat
from samestep.state.snapshot import Snapshots
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import Heartbeat
from samestep.training.cadence import Cadence, Decision
from samestep.training.evaluate import Evaluator
from samestep.training.monitor import StepMonitor
from samestep.training.timing import PHASES, Times
from samestep.user_code.callbacks import Callbacks
from samestep.user_code.references import UserCode
from samestep.verification.one_by_one import Passes
from samestep.verification.probe import Probe, Witness
from samestep.verification.second_worker import Verifier


Report = Callable[[Message], None]
"""Send a message to the supervisor."""
NO_METRICS: Mapping[str, Any] = MappingProxyType({})
REPORTS_PER_EPOCH = 20
MAX_STEPS_PER_REPORT = 50
COPY_SECONDS = 30.0
"""Deadline for the supervisor to copy a snapshot of which a checkpoint is kept."""


class Connect(Protocol):
    """How the workers meet, and make the exchange."""

    def __call__(self, flat: Flat, shares: list[Share], /) -> Exchange:
        """All workers: make the exchange for a model's vectors and their shares."""

    def meet(self, done: str) -> None:
        """All workers: wait until all have done a part of their start."""


@dataclass(frozen=True)
class WorkerContext:
    """What a worker's process has for its job."""

    setup: Setup
    recipe: Recipe
    topology: Topology
    fds: Mapping[str, int]
    """Descriptors of memory that outlives the worker: `snapshots`, and `constants` for
    the part of the state_dict that training does not change."""
    connect: Connect
    report: Report
    heartbeat: Heartbeat
    faults: Faults
    user_code: UserCode = field(default_factory=UserCode)
    device: Device = field(default_factory=Device)
    # Processes that were forked for this worker before it loaded anything.
    helper: HelperProcess | None = None
    """Draws micro-batches ahead of time, where that can take long."""
    witness: Witness | None = None
    """Computes micro-batches again, for the probe."""


@dataclass(frozen=True)
class Samples:
    """The training samples, as micro-batches on the worker's device."""

    data: Dataset
    plan: Plan
    prefetcher: Prefetcher
    device: Device

    def num_targets(self, step: int) -> int:
        """Return the targets of a step's global batch; steps count from 0."""
        return self.plan.batch_size(step) * self.data.targets_per_sample

    def num_nonempty_micro_batches(self, step: int) -> int:
        """Return how many micro-batches of a step have samples."""
        return self.plan.num_pieces(step)

    def draw(
        self, step: int, index: int, owned: Share
    ) -> tuple[Nested, Tensor | Mixed]:
        """Return inputs [b, ...] and targets of one of the worker's micro-batches.

        Seeds all generators for this micro-batch, on whichever worker: the device's
        here, the CPU's where the samples are drawn.
        """
        self.device.seed(derive_seed(self.plan.seed, "step", step, index))
        return self.device.to_device(*self.prefetcher.draw(step, index, owned))


@dataclass(frozen=True)
class Replica:
    """This worker's copy of the model, and what updates it."""

    model: nn.Module
    flat: Flat
    """The model's parameters and buffers as one vector."""
    exchange: Exchange
    optimizer: Optimizer
    averages: WeightAverages
    passes: AutogradPasses | RecordedPasses
    """What computes the micro-batches: by torch, or with portable arithmetic."""
    norms: Norms = TORCH_NORMS


@dataclass
class Ownership:
    """Which micro-batches each worker computes, and how that changes."""

    rank: int
    exchange: Exchange
    balancer: Balancer
    is_random: bool
    """Whether ownership changes at random with every step, as in tests."""

    @property
    def micro_batches(self) -> Share:
        """Those of this worker."""
        return self.exchange.shares[self.rank]

    def decide(self, decision: Decision) -> Decision:
        """Return the decision with what this worker's balancer proposes.

        Every worker proposes; only that of rank 0 counts, after the merge.
        """
        change, straggler = self.balancer.proposal, self.balancer.straggler_to_drop
        counts = tuple(lengths(change.after)) if change else ()
        return replace(decision, leaving=straggler, counts=counts)

    def observe(self, steps: int, times: Times) -> Straggler | None:
        """Take the times of all workers in some steps; return a new straggler."""
        seconds = dict(zip(PHASES, times.seconds.T, strict=True))
        compute = seconds["data"] + seconds["forward"] + seconds["backward"]
        window = StepWindow(
            steps,
            times.seconds[0].sum().item(),
            compute.tolist(),
            seconds["data"].tolist(),
            seconds["wait"].tolist(),
            seconds["optimizer"].tolist(),
        )
        self.balancer.observe(window)
        return self.balancer.straggler

    def adopt(self, counts: Sequence[int]) -> Change:
        """All workers, between two steps: adopt the ownership of rank 0's decision."""
        change = self.balancer.adopt(contiguous(counts))
        self.exchange.assign(change.after)
        return change

    def shuffle(self, step: int) -> None:
        """All workers: change ownership at random, if that was asked for."""
        if self.is_random:
            workers, total = self.exchange.workers, self.balancer.micro_batches
            self.exchange.assign(random_ownership(total, workers, step))


@dataclass
class Trainer:
    """One worker of a training."""

    recipe: Recipe
    topology: Topology
    report: Report
    """Does nothing but on the first worker of each node."""
    samples: Samples
    replica: Replica
    passes: Passes
    """Those of the replica, perhaps one by one."""
    ownership: Ownership
    evaluator: Evaluator
    probe: Probe | None
    verifier: Verifier
    monitor: StepMonitor
    cadence: Cadence
    snapshots: Snapshots
    progress: Progress
    conditions: dict[str, str]
    """Conditions that only workers observe (`system.conditions.FOUND_BY_WORKERS`)."""
    factor: CustomFactor | None = None
    """The schedule if it is the user's own."""
    kept: frozenset[int] = frozenset()
    """Steps after which a snapshot is saved, for checkpoints that are kept."""
    until: int | None = None
    """The step after which the workers stop; None: the last one."""
    lr_range: LrRange | None = None
    """Learning rates to try, instead of those of the recipe."""
    callbacks: Callbacks | None = None
    """Those of the user, on rank 0."""
    _to_keep: int = field(default=0, init=False)
    """The step of the last snapshot of which a checkpoint is kept."""

    def with_marks(self, decision: Decision) -> Decision:
        """Return the decision with what is due after certain steps, at any speed."""
        save = decision.save or self.is_marked
        stop = decision.stop or self.progress.step == self.until
        return replace(decision, save=save, stop=stop)

    def notify(self, method: str, metrics: Mapping[str, Any] = NO_METRICS) -> None:
        """Call a method of the callbacks, if there are any. Raises OwnCodeError."""
        if self.callbacks is None:
            return
        self.monitor.heartbeat.beat()
        progress = self.progress
        within = progress.step == 0 or progress.epoch.targets > 0
        self.callbacks.call(
            method,
            self.replica.model,
            progress.step,
            progress.epochs + within,
            self.learning_rate(max(0, progress.step - 1)),
            metrics,
        )

    @property
    def num_steps(self) -> int:
        """The optimizer steps of the whole training."""
        return self.recipe.num_steps(self.samples.plan.steps_per_epoch)

    def ends_epoch(self, step: int) -> bool:
        """Return whether an epoch or the training ends after a number of steps."""
        return self.samples.plan.begins_epoch(step) or self.ends(step)

    def is_evaluated(self, step: int) -> bool:
        """Return whether the model is evaluated after a number of steps."""
        if self.lr_range is not None:
            return False
        every = self.recipe.evaluation_steps
        return self.ends_epoch(step) if every is None else self._is_every(step, every)

    def _is_every(self, step: int, every: int) -> bool:
        return step % every == 0 or self.ends(step)

    def ends(self, step: int) -> bool:
        """Return whether the training ends after a number of steps."""
        if self.recipe.epochs is None:
            return step == self.recipe.max_steps
        return self.samples.plan.place(step)[0] >= self.recipe.epochs

    @property
    def pauses(self) -> bool:
        """Whether an epoch ends or the model is evaluated after the last step."""
        step = self.progress.step
        return self.ends_epoch(step) or self.is_evaluated(step)

    @property
    def is_logged(self) -> bool:
        """Whether there is a record of the steps that were just taken."""
        plan = self.samples.plan
        _, place = plan.place(self.progress.step)
        return self.pauses or place % steps_per_report(plan) == 0

    @property
    def is_marked(self) -> bool:
        """Whether a snapshot is saved after the last step, at any speed."""
        step = self.progress.step
        return step in self.kept or self.cadence.is_due(step)

    @property
    def is_due(self) -> bool:
        """Whether all workers synchronise after the last step, at any speed."""
        return self.is_marked or self.is_logged or self.progress.step == self.until

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over all epochs.

        On a plateau it is that of the next steps.
        """
        if self.lr_range is not None:
            return self.lr_range.rate(step)
        steps = self.samples.plan.steps_per_epoch
        rate = rate_of(self.recipe, step, steps, self.factor)
        return rate * self.progress.plateau.factor

    def save(self) -> int:
        """All workers: copy this worker's part of the state; return the slot.

        The workers of each node together copy all of it, since every node keeps
        snapshots of its own. The rest that only the leader writes is small.
        """
        self._await_copy()
        replica, topology = self.replica, self.topology
        exchange, flat = replica.exchange, replica.flat
        first, end = flat.layout.slices(topology.local_workers)[topology.local_rank]
        part = slice(first - exchange.owned[0], end - exchange.owned[0])
        if isinstance(replica.optimizer, CustomOptimizer):
            self.progress.optimizer = replica.optimizer.save()
        rest = (
            replica.averages.buffers().cpu().numpy(),
            self._saved_progress().model_dump(),
        )
        return self.snapshots.save(
            topology.local_rank,
            exchange.parameters[first:end].cpu().numpy(),
            [state[part].cpu().numpy() for state in exchange.states],
            self.progress.step,
            rest if topology.is_leader else None,
        )

    def _await_copy(self) -> None:
        """Let the supervisor copy a snapshot to keep before a slot is written again."""
        end = time.monotonic() + COPY_SECONDS
        while self.monitor.heartbeat.handled < self._to_keep:
            if time.monotonic() > end:
                text = _not_copied(self._to_keep)
                self.report(WorkerWarning(worker=self.topology.rank, text=text))
                self._to_keep = 0
            time.sleep(0.001)
        if self.progress.step in self.kept:
            self._to_keep = self.progress.step

    def _saved_progress(self) -> Progress:
        """Return the progress with what is counted elsewhere between two snapshots."""
        phases = self.monitor.epoch_times.seconds.mean(dim=0)
        phases += torch.tensor(self.progress.phases, dtype=torch.float64)
        counts = self.replica.flat.counts
        changed: dict[str, Any] = {"counts": counts, "phases": phases.tolist()}
        plan = self.samples.plan
        if isinstance(plan, StreamPlan):
            changed["stream"] = plan.reader.at(self.progress.step).position
        return self.progress.model_copy(update=changed)

    def restore(self) -> None:
        """All workers: go on from the newest snapshot, if there is one.

        Each loads the slice that it updates; then all gather the parameters, which
        also keeps any of them from being ahead of the others.
        """
        state = self.snapshots.follow()
        if state is None:
            return
        replica, exchange = self.replica, self.replica.exchange
        part = slice(*exchange.owned)
        self.progress = Progress.model_validate(state.progress)
        plan, position = self.samples.plan, self.progress.stream
        if isinstance(plan, StreamPlan) and position is not None:
            plan.reader.go_to(self.progress.step, position)
        exchange.parameters[part] = torch.from_numpy(state.parameters)[part]
        saved_states = torch.from_numpy(state.states)
        for own, saved in zip(exchange.states, saved_states, strict=True):
            own.copy_(saved[part])
        tail = torch.from_numpy(state.tail)
        replica.averages.set_buffers(tail, self.progress.counts)
        step = self.progress.step
        replica.optimizer.resume(map(self.learning_rate, range(step)), step)
        if isinstance(replica.optimizer, CustomOptimizer):
            replica.optimizer.restore(self.progress.optimizer)
        exchange.all_gather_parameters()


def _not_copied(step: int) -> str:
    return (
        f"The supervisor must copy the snapshot of step {step}, whose checkpoint is to "
        f"be kept, within {COPY_SECONDS:.0f} s; it did not, and the training goes on. "
        "That checkpoint may be missing, so that an audit has a longer segment there. "
        "Is the machine out of memory, or its disk slow?"
    )


def steps_per_report(plan: Plan) -> int:
    """Return the number of optimizer steps between two step records."""
    if not plan.steps_per_epoch:
        return MAX_STEPS_PER_REPORT
    per_report = plan.steps_per_epoch // REPORTS_PER_EPOCH
    return max(1, min(per_report, MAX_STEPS_PER_REPORT))
