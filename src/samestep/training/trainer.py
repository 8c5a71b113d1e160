"""The parts of one worker, and how they are put together."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from samestep.config.recipe import Recipe
from samestep.core.balancer import Balancer
from samestep.core.lr_schedule import learning_rate
from samestep.core.metric import num_cells
from samestep.core.ownership import contiguous, shares
from samestep.core.plan import Plan
from samestep.core.topology import Topology
from samestep.data import dataset
from samestep.data.prefetch import Helper, MicroBatches, Prefetcher
from samestep.exchange import Exchange
from samestep.models import compiling
from samestep.models.device import Device
from samestep.optim.averaging import WeightAverages
from samestep.optim.optimizer import Update
from samestep.optim.param_groups import stretches
from samestep.state import frozen
from samestep.state.flat import Flat
from samestep.state.snapshot import Snapshots
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import COMPILING, MEETING, Heartbeat
from samestep.training.cadence import Cadence
from samestep.training.components import Parts, load_and_build
from samestep.training.evaluate import Evaluator
from samestep.training.metrics import StepLedger
from samestep.training.progress import Progress, Stopwatch
from samestep.training.timing import Clock, Tracer
from samestep.user_code.references import UserCode, names, title
from samestep.verification import startup
from samestep.verification.probe import Probe, Witness
from samestep.verification.watch import MutationCheck


Report = Callable[[dict[str, Any]], None]
Connect = Callable[[Flat, list[tuple[int, int]]], Exchange]

REPORTS_PER_EPOCH = 20
MOST_STEPS_PER_REPORT = 50


@dataclass(frozen=True)
class Surroundings:
    """What the process of a worker gives to its training."""

    topology: Topology
    connect: Connect
    """Makes the exchange from the model's vectors and all workers' micro-batches."""
    report: Report
    """Sends a message to the supervisor."""
    heartbeat: Heartbeat
    faults: Faults
    snapshots: int | None
    """Descriptor of the memory for snapshots; only a training has it."""
    snapshot_seconds: float
    balance: str | list[int]
    """`auto`, `off`, `random`, or how many micro-batches each worker owns."""
    evict_slower_than: float
    profile: int
    """Steps to trace."""
    helper: Helper | None = None
    """Draws micro-batches ahead of time, where that can take long."""
    probe: bool = False
    """Whether own code is computed again to see whether it does the same."""
    witness: Witness | None = None
    """The other process that does so."""
    patience: float = 60.0
    """Seconds that the end waits for it, besides what loading and building took."""
    constants: int | None = None
    """Descriptor of the memory for what the training does not change."""
    own: UserCode = field(default_factory=UserCode)
    """Finds the user's functions."""
    most_steps: int | None = None
    """Full global batches of an epoch, to try a recipe out; None: all."""
    device: Device = field(default_factory=Device)
    samples: str = ""
    """The checksum of samples that the run began with; empty: not known."""


@dataclass
class Trainer:
    """One worker of a training."""

    recipe: Recipe
    topology: Topology
    report: Report
    """Does nothing but on the first worker of each node."""

    data: dataset.Dataset
    conditions: dict[str, str]
    """Of `conditions.FOUND_BY_WORKERS`."""
    plan: Plan
    feed: Prefetcher
    owned: tuple[int, int]
    """The micro-batches of this worker."""
    balancer: Balancer
    is_random: bool
    """Whether ownership changes at random with every step."""

    device: Device
    model: nn.Module
    flat: Flat
    exchange: Exchange
    objective: nn.Module
    update: Update
    kept: WeightAverages
    evaluator: Evaluator
    mutation_check: MutationCheck | None
    """Watches a model of the user's own."""
    probe: Probe | None

    heartbeat: Heartbeat
    faults: Faults
    cadence: Cadence
    snapshots: Snapshots

    clock: Clock
    ledger: StepLedger
    stopwatch: Stopwatch
    progress: Progress
    steps_per_report: int
    bytes: int = 0
    """Exchanged by all workers since notes were last compared."""
    network_bytes: int = 0
    """The part of them that went from one node to another."""

    def assign(self, owned: list[tuple[int, int]]) -> None:
        """All workers, between two steps: who computes which micro-batches."""
        self.owned = owned[self.topology.rank]
        self.exchange.assign(owned)

    def learning_rate(self, step: int) -> float:
        """Of one step, counted from 0 over all epochs."""
        recipe, per_epoch = self.recipe, self.plan.steps_per_epoch
        return learning_rate(
            recipe.schedule, recipe.optimizer.lr, step, per_epoch, recipe.epochs
        )


def build(recipe: Recipe, around: Surroundings) -> Trainer:
    """All workers. Goes on from the newest snapshot, if there is one.

    Raises DataError, PlacementError.
    """
    topology, start = around.topology, time.monotonic()
    assert around.snapshots is not None
    what = around.own, around.most_steps, around.device
    parts = load_and_build(recipe, *what, around.heartbeat.enter)
    data, plan, model, loss, flat, unused = parts
    seconds = time.monotonic() - start
    if topology.is_leader and around.constants is not None:
        frozen.write(around.constants, flat.constants)
    balancer = _balancer(recipe, around)
    around.heartbeat.enter(MEETING)
    exchange = around.connect(flat, balancer.owned)
    conditions = _compare(recipe, around, parts, exchange)
    attached = _attach(recipe, around, parts, exchange)
    per_report = _steps_per_report(plan)
    feed = _feed(recipe, data, plan, around)
    trainer = Trainer(
        recipe=recipe,
        topology=topology,
        report=around.report if topology.is_leader else lambda _: None,
        data=data,
        conditions=conditions,
        plan=plan,
        feed=feed,
        owned=balancer.owned[topology.rank],
        balancer=balancer,
        is_random=around.balance == "random",
        device=around.device,
        model=model,
        flat=flat,
        exchange=exchange,
        objective=attached,
        update=_update(recipe, flat, exchange),
        kept=WeightAverages(recipe, flat, exchange),
        evaluator=Evaluator(
            model,
            recipe,
            data,
            topology.rank,
            exchange,
            around.heartbeat,
            around.device,
            loss,
        ),
        mutation_check=_unchanged(recipe, model, flat),
        probe=_probe(recipe, around, parts, feed, exchange, seconds),
        heartbeat=around.heartbeat,
        faults=around.faults,
        cadence=Cadence(around.heartbeat, around.snapshot_seconds),
        snapshots=Snapshots(around.snapshots, flat.layout, topology.local_workers),
        clock=_clock(around),
        ledger=StepLedger(
            plan.micro_batches,
            per_report,
            topology,
            exchange,
            num_cells(data.own_metrics),
        ),
        stopwatch=Stopwatch(topology.workers),
        progress=Progress(counts=flat.counts),
        steps_per_report=per_report,
    )
    _resume(trainer)
    if unused and trainer.progress.step == 0:
        trainer.report({"type": "unused", "parameters": unused})
    return trainer


def _steps_per_report(plan: Plan) -> int:
    per_report = plan.steps_per_epoch // REPORTS_PER_EPOCH
    return max(1, min(per_report, MOST_STEPS_PER_REPORT))


def _update(recipe: Recipe, flat: Flat, exchange: Exchange) -> Update:
    """The optimizer on the slice that this worker updates."""
    return Update(
        recipe.optimizer,
        exchange.parameters[slice(*exchange.owned)],
        exchange.states,
        stretches(recipe.optimizer, flat.layout, exchange.owned),
    )


def _compare(
    recipe: Recipe, around: Surroundings, parts: Parts, exchange: Exchange
) -> dict[str, str]:
    """All workers must have the same data and model; what a run keeps of that."""
    check = startup.Check(recipe, around.topology.rank, exchange)
    samples = check.data(parts.data)
    startup.check_kept(around.samples, samples)
    check.model(parts.model)
    return startup.conditions(recipe, samples)


def _attach(
    recipe: Recipe, around: Surroundings, parts: Parts, exchange: Exchange
) -> nn.Module:
    """The model with its loss, bound to the exchange; compiled if the recipe says so.

    The layers of built-in families take part in every pass, once; other models may
    branch.
    """
    objective = parts.objective(recipe)
    attached = exchange.attach(objective, overlap="model" not in names(recipe))
    if recipe.compile:
        around.heartbeat.enter(COMPILING)
        compiling.prepare(objective, parts.data, parts.plan, parts.flat)
    return attached


def _balancer(recipe: Recipe, around: Surroundings) -> Balancer:
    workers = around.topology.workers
    owned = shares(recipe.micro_batches, workers)
    if isinstance(around.balance, list) and len(around.balance) == workers:
        owned = contiguous(around.balance)
    return Balancer(
        recipe.micro_batches,
        owned,
        is_live=around.balance == "auto" and workers > 1,
        evict_slower_than=around.evict_slower_than,
    )


def _feed(
    recipe: Recipe, data: dataset.Dataset, plan: Plan, around: Surroundings
) -> Prefetcher:
    message = {"type": "prefetching", "worker": around.topology.rank}
    report = partial(around.report, message)
    source = MicroBatches(data, plan, bool(names(recipe)))
    return Prefetcher(source, around.helper, report)


def _unchanged(recipe: Recipe, model: nn.Module, flat: Flat) -> MutationCheck | None:
    name = names(recipe).get("model")
    return MutationCheck(model, flat, title(name, "model")) if name else None


def _probe(
    recipe: Recipe,
    around: Surroundings,
    parts: Parts,
    feed: Prefetcher,
    exchange: Exchange,
    seconds: float,
) -> Probe | None:
    """`seconds` is what loading and building took, and will take the witness."""
    if not around.probe or not names(recipe):
        return None
    report, rank = around.report, around.topology.rank
    return Probe(
        parts.replay(recipe, feed.replay, around.device),
        exchange,
        exchange.parameters,
        rank,
        around.heartbeat,
        lambda text: report({"type": "warning", "worker": rank, "text": text}),
        around.witness,
        around.patience + 3 * seconds,
    )


def save(trainer: Trainer) -> int:
    """All workers: each copies its part of the state; returns the slot.

    Together, the workers of each node copy all of it.
    """
    exchange, flat, topology = trainer.exchange, trainer.flat, trainer.topology
    first, end = flat.layout.slices(topology.local_workers)[topology.local_rank]
    part = slice(first - exchange.owned[0], end - exchange.owned[0])
    phases = trainer.stopwatch.epoch.seconds.mean(dim=0) + torch.tensor(
        trainer.progress.phases
    )
    progress = replace(
        trainer.progress, counts=flat.counts, phases=phases.tolist()
    ).to_dict()
    rest = (trainer.kept.buffers().cpu().numpy(), progress)
    return trainer.snapshots.save(
        topology.local_rank,
        exchange.parameters[first:end].cpu().numpy(),
        [state[part].cpu().numpy() for state in exchange.states],
        trainer.progress.step,
        rest if topology.is_leader else None,
    )


def _clock(around: Surroundings) -> Clock:
    if not around.profile:
        return Clock()
    report = around.report
    return Tracer(
        around.profile,
        lambda spans: report({"type": "trace", "spans": spans}),
        around.device.finish,
    )


def _resume(trainer: Trainer) -> None:
    """All workers: each loads what it updates; then nobody is ahead of the others."""
    state = trainer.snapshots.follow()
    if state is None:
        return
    exchange, part = trainer.exchange, slice(*trainer.exchange.owned)
    trainer.progress = Progress.from_dict(state.progress)
    exchange.parameters[part] = torch.from_numpy(state.parameters)[part]
    for own, saved in zip(exchange.states, torch.from_numpy(state.states), strict=True):
        own.copy_(saved[part])
    trainer.kept.set_buffers(torch.from_numpy(state.tail), trainer.progress.counts)
    trainer.update.resume(trainer.progress.step)
    exchange.all_gather_parameters()
