"""The parts of one worker of a training, each with only what it needs.

`training.build` puts them together, `training.train` runs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from samestep.config.recipe import Recipe
from samestep.core.balancer import Balancer, Change, random_ownership
from samestep.core.lr_schedule import rate_of
from samestep.core.ownership import Share, contiguous, lengths
from samestep.core.plan import Plan, derive_seed
from samestep.core.progress import Progress
from samestep.core.speeds import StepWindow
from samestep.core.straggler import Straggler
from samestep.core.topology import Topology
from samestep.data.augment import Mixed
from samestep.data.dataset import Dataset
from samestep.data.prefetch import Prefetcher
from samestep.data.pytree import Nested
from samestep.exchange import Exchange
from samestep.messages.training import Message
from samestep.models.device import Device
from samestep.optim.averaging import WeightAverages
from samestep.optim.gradients import TORCH_NORMS, Norms
from samestep.optim.optimizer import Optimizer
from samestep.portable.passes import RecordedPasses
from samestep.state.flat import Flat
from samestep.state.snapshot import Snapshots
from samestep.training.cadence import Cadence, Decision
from samestep.training.evaluate import Evaluator
from samestep.training.monitor import StepMonitor
from samestep.training.timing import PHASES, Times
from samestep.verification.probe import Probe


Report = Callable[[Message], None]
"""Send a message to the supervisor."""

REPORTS_PER_EPOCH = 20
MAX_STEPS_PER_REPORT = 50


@dataclass(frozen=True)
class Samples:
    """The training samples, as micro-batches on the worker's device."""

    data: Dataset
    plan: Plan
    prefetcher: Prefetcher
    device: Device

    def num_targets(self, step: int) -> int:
        """Return the targets of a step's global batch; steps count from 0."""
        step_in_epoch = step % self.plan.steps_per_epoch
        return self.plan.batch_size(step_in_epoch) * self.data.targets_per_sample

    def num_nonempty_micro_batches(self, step: int) -> int:
        """Return how many micro-batches of a step have samples."""
        return self.plan.num_pieces(step % self.plan.steps_per_epoch)

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
    objective: nn.Module
    """The model with its loss, bound to the exchange; perhaps compiled."""
    flat: Flat
    """The model's parameters and buffers as one vector."""
    exchange: Exchange
    optimizer: Optimizer
    averages: WeightAverages
    norms: Norms = TORCH_NORMS
    passes: RecordedPasses | None = None
    """With portable arithmetic: what computes the micro-batches, instead of the
    objective."""


@dataclass
class Ownership:
    """Which micro-batches each worker computes, and how that changes."""

    rank: int
    exchange: Exchange
    balancer: Balancer
    is_random: bool
    """Whether ownership changes at random with every step, as in tests."""
    micro_batches: Share
    """Those of this worker."""

    def assign(self, shares: list[Share]) -> None:
        """All workers, between two steps: take over these shares of micro-batches."""
        self.micro_batches = shares[self.rank]
        self.exchange.assign(shares)

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
        self.assign(change.after)
        return change

    def shuffle(self, step: int) -> None:
        """All workers: change ownership at random, if that was asked for."""
        if self.is_random:
            workers, total = self.exchange.workers, self.balancer.micro_batches
            self.assign(random_ownership(total, workers, step))


@dataclass
class Trainer:
    """One worker of a training."""

    recipe: Recipe
    topology: Topology
    report: Report
    """Does nothing but on the first worker of each node."""
    samples: Samples
    replica: Replica
    ownership: Ownership
    evaluator: Evaluator
    probe: Probe | None
    monitor: StepMonitor
    cadence: Cadence
    snapshots: Snapshots
    progress: Progress
    conditions: dict[str, str]
    """Conditions that only workers observe (`system.conditions.FOUND_BY_WORKERS`)."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over all epochs."""
        return rate_of(self.recipe, step, self.samples.plan.steps_per_epoch)

    def save(self) -> int:
        """All workers: copy this worker's part of the state; return the slot.

        The workers of each node together copy all of it, since every node keeps
        snapshots of its own. The rest that only the leader writes is small.
        """
        replica, topology = self.replica, self.topology
        exchange, flat = replica.exchange, replica.flat
        first, end = flat.layout.slices(topology.local_workers)[topology.local_rank]
        part = slice(first - exchange.owned[0], end - exchange.owned[0])
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

    def _saved_progress(self) -> Progress:
        """Return the progress with what is counted elsewhere between two snapshots."""
        phases = self.monitor.epoch_times.seconds.mean(dim=0)
        phases += torch.tensor(self.progress.phases, dtype=torch.float64)
        counts = self.replica.flat.counts
        changed = {"counts": counts, "phases": phases.tolist()}
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
        exchange.parameters[part] = torch.from_numpy(state.parameters)[part]
        saved_states = torch.from_numpy(state.states)
        for own, saved in zip(exchange.states, saved_states, strict=True):
            own.copy_(saved[part])
        tail = torch.from_numpy(state.tail)
        replica.averages.set_buffers(tail, self.progress.counts)
        replica.optimizer.resume(self.progress.step)
        exchange.all_gather_parameters()


def steps_per_report(plan: Plan) -> int:
    """Return the number of optimizer steps between two step records."""
    per_report = plan.steps_per_epoch // REPORTS_PER_EPOCH
    return max(1, min(per_report, MAX_STEPS_PER_REPORT))
