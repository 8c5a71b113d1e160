"""Where a worker is put together: for a training, a measurement or an evaluation."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from samestep.config.recipe import Recipe
from samestep.core.balancer import Balancer
from samestep.core.metric import num_cells
from samestep.core.ownership import Share, contiguous, shares
from samestep.core.topology import Topology
from samestep.data.prefetch import HelperProcess, MicroBatches, Prefetcher
from samestep.exchange import Exchange
from samestep.messages.training import (
    Prefetching,
    Traced,
    UnusedParameters,
    WorkerWarning,
)
from samestep.models import compiling
from samestep.models.device import Device
from samestep.optim.averaging import WeightAverages
from samestep.optim.optimizer import SliceOptimizer
from samestep.optim.param_groups import slices
from samestep.state import frozen
from samestep.state.flat import Flat
from samestep.state.snapshot import Snapshots
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import COMPILING, MEETING, Heartbeat
from samestep.training.cadence import Cadence
from samestep.training.components import (
    Components,
    TrainedModel,
    load_and_build,
    load_trained,
)
from samestep.training.evaluate import Evaluator
from samestep.training.metrics import MetricsBuffer
from samestep.training.monitor import StepMonitor
from samestep.training.progress import Progress
from samestep.training.timing import Clock, Tracer
from samestep.training.trainer import (
    Ownership,
    Replica,
    Report,
    Samples,
    Trainer,
    steps_per_report,
)
from samestep.user_code.references import UserCode, names, title
from samestep.verification import startup
from samestep.verification.mutation_check import MutationCheck
from samestep.verification.probe import Probe, Witness


Connect = Callable[[Flat, list[Share]], Exchange]
"""Make the exchange, from a model's vectors and all workers' micro-batches."""


@dataclass(frozen=True)
class WorkerContext:
    """What every job needs of its worker's process."""

    topology: Topology
    connect: Connect
    report: Report
    heartbeat: Heartbeat
    faults: Faults
    user_code: UserCode = field(default_factory=UserCode)
    device: Device = field(default_factory=Device)


@dataclass(frozen=True)
class TrainSettings:
    """How to train, besides the recipe; only `max_steps` decides the result, too."""

    snapshot_seconds: float = 0.0
    """Seconds between snapshots; 0: none."""
    balance: str | list[int] = "off"
    """`auto`, `off`, `random`, or how many micro-batches each worker owns."""
    drop_stragglers_below: float = 0.0
    """Drop a worker below this share of the others' median speed."""
    profile: int = 0
    """Steps to trace."""
    probe: bool = False
    """Whether user code is computed again to see that it gives the same result."""
    witness_timeout: float = 60.0
    """Seconds that the end of the training waits for the witness, besides three
    times what loading and building took."""
    max_steps: int | None = None
    """Full global batches of an epoch, to try a recipe out; None: all."""
    samples: str = ""
    """The checksum of samples that the run began with; empty: not known."""


@dataclass(frozen=True)
class Memory:
    """Descriptors of shared memory that outlives the worker."""

    snapshots: int
    constants: int | None = None
    """For the part of the state_dict that training does not change."""


@dataclass(frozen=True)
class Assistants:
    """Processes that were forked for this worker before it loaded anything."""

    helper: HelperProcess | None = None
    """Draws micro-batches ahead of time, where that can take long."""
    witness: Witness | None = None
    """Computes micro-batches again, for the probe."""


def build_trainer(
    recipe: Recipe,
    context: WorkerContext,
    settings: TrainSettings,
    memory: Memory,
    assistants: Assistants | None = None,
) -> Trainer:
    """All workers: build the parts, and go on from the newest snapshot, if any.

    Raises DataError, RecipeError, OwnCodeError, PlacementError.
    """
    topology, heartbeat, start = context.topology, context.heartbeat, time.monotonic()
    assistants = assistants or Assistants()
    components = load_and_build(
        recipe, context.user_code, settings.max_steps, context.device, heartbeat.enter
    )
    seconds = time.monotonic() - start
    # The supervisor completes files of weights with them; snapshots leave them out.
    if topology.is_leader and memory.constants is not None:
        frozen.write(memory.constants, components.flat.constants)
    balancer = _balancer(recipe, settings, topology.workers)
    heartbeat.enter(MEETING)
    exchange = context.connect(components.flat, balancer.owned)
    # Before parameters are shared: afterwards a difference would be hidden.
    conditions = _check_startup(recipe, settings, topology.rank, components, exchange)
    replica = _replica(recipe, components, exchange, heartbeat)
    samples = _samples(recipe, context, components, assistants.helper)
    probe = None
    if settings.probe and names(recipe):
        # The witness must load and build, too, beside workers that already compute.
        timeout, witness = settings.witness_timeout + 3 * seconds, assistants.witness
        probe = _probe(recipe, context, components, samples, exchange, witness, timeout)
    trainer = Trainer(
        recipe=recipe,
        topology=topology,
        report=context.report if topology.is_leader else lambda _: None,
        samples=samples,
        replica=replica,
        ownership=_ownership(settings, topology.rank, balancer, exchange),
        evaluator=_evaluator(recipe, context, components, exchange),
        probe=probe,
        monitor=_monitor(recipe, context, settings.profile, components, exchange),
        cadence=Cadence(heartbeat, settings.snapshot_seconds),
        snapshots=Snapshots(
            memory.snapshots, components.flat.layout, topology.local_workers
        ),
        progress=Progress(counts=components.flat.counts),
        conditions=conditions,
    )
    trainer.restore()
    if components.unused and trainer.progress.step == 0:
        trainer.report(UnusedParameters(parameters=list(components.unused)))
    return trainer


def build_evaluator(
    recipe: Recipe, context: WorkerContext, split: str, model_file: Path
) -> Evaluator:
    """All workers: load the data, and the weights of a model file, to evaluate them.

    Raises DataError, OwnCodeError, RunError.
    """
    heartbeat = context.heartbeat
    trained = load_trained(
        recipe, context.user_code, split, model_file, context.device, heartbeat.enter
    )
    heartbeat.enter(MEETING)
    workers = context.topology.workers
    exchange = context.connect(Flat(trained.model), shares(workers, workers))
    return _evaluator(recipe, context, trained, exchange)


def _check_startup(
    recipe: Recipe,
    settings: TrainSettings,
    rank: int,
    components: Components,
    exchange: Exchange,
) -> dict[str, str]:
    """All workers: check that they have the same data and model.

    Returns the conditions that the run keeps, for a later resume.
    """
    check = startup.StartupCheck(recipe, rank, exchange)
    samples = check.check_data(components.data)
    startup.check_resumed(settings.samples, samples)
    check.check_model(components.model)
    return startup.conditions(recipe, samples)


def _balancer(recipe: Recipe, settings: TrainSettings, workers: int) -> Balancer:
    owned = shares(recipe.micro_batches, workers)
    # A fixed balance was given for another number of workers if some have left since.
    if isinstance(settings.balance, list) and len(settings.balance) == workers:
        owned = contiguous(settings.balance)
    return Balancer(
        recipe.micro_batches,
        owned,
        is_live=settings.balance == "auto" and workers > 1,
        drop_stragglers_below=settings.drop_stragglers_below,
    )


def _ownership(
    settings: TrainSettings, rank: int, balancer: Balancer, exchange: Exchange
) -> Ownership:
    is_random = settings.balance == "random"
    return Ownership(rank, exchange, balancer, is_random, balancer.owned[rank])


def _replica(
    recipe: Recipe, components: Components, exchange: Exchange, heartbeat: Heartbeat
) -> Replica:
    """All workers: bind the model to the exchange, and the optimizer to its slice."""
    objective = components.objective(recipe)
    # Every pass uses each layer of a built-in family once, so gradients may be sent
    # while others are computed. The user's own model may branch.
    attached = exchange.attach(objective, overlap="model" not in names(recipe))
    flat = components.flat
    if recipe.compile:
        heartbeat.enter(COMPILING)
        compiling.prepare(objective, components.data, components.plan, flat)
    optimizer = SliceOptimizer(
        recipe.optimizer,
        exchange.parameters[slice(*exchange.owned)],
        exchange.states,
        slices(recipe.optimizer, flat.layout, exchange.owned),
    )
    averages = WeightAverages(recipe, flat, exchange)
    return Replica(components.model, attached, flat, exchange, optimizer, averages)


def _samples(
    recipe: Recipe,
    context: WorkerContext,
    components: Components,
    helper: HelperProcess | None,
) -> Samples:
    data, plan = components.data, components.plan
    message = Prefetching(worker=context.topology.rank)
    source = MicroBatches(data, plan, bool(names(recipe)))
    prefetcher = Prefetcher(source, helper, partial(context.report, message))
    return Samples(data, plan, prefetcher, context.device)


def _evaluator(
    recipe: Recipe,
    context: WorkerContext,
    parts: Components | TrainedModel,
    exchange: Exchange,
) -> Evaluator:
    return Evaluator(
        parts.model,
        recipe,
        parts.data,
        context.topology.rank,
        exchange,
        context.heartbeat,
        context.device,
        parts.loss,
    )


def _probe(
    recipe: Recipe,
    context: WorkerContext,
    components: Components,
    samples: Samples,
    exchange: Exchange,
    witness: Witness | None,
    timeout: float,
) -> Probe:
    report, rank = context.report, context.topology.rank
    return Probe(
        components.replay(recipe, samples.prefetcher.replay, context.device),
        exchange,
        exchange.parameters,
        rank,
        context.heartbeat,
        lambda text: report(WorkerWarning(worker=rank, text=text)),
        witness,
        timeout,
    )


def _monitor(
    recipe: Recipe,
    context: WorkerContext,
    profile: int,
    components: Components,
    exchange: Exchange,
) -> StepMonitor:
    plan = components.plan
    metrics = MetricsBuffer(
        plan.micro_batches,
        steps_per_report(plan),
        context.topology,
        exchange,
        num_cells(components.data.own_metrics),
    )
    return StepMonitor(
        _clock(context, profile),
        context.heartbeat,
        context.faults,
        metrics,
        _mutation_check(recipe, components),
        exchange,
        context.device,
    )


def _mutation_check(recipe: Recipe, components: Components) -> MutationCheck | None:
    """Return the check of the user's own model; built-in ones need none."""
    name = names(recipe).get("model")
    if name is None:
        return None
    return MutationCheck(components.model, components.flat, title(name, "model"))


def _clock(context: WorkerContext, profile: int) -> Clock:
    if not profile:
        return Clock()
    report, rank = context.report, context.topology.rank
    return Tracer(
        profile,
        lambda spans: report(Traced(worker=rank, spans=spans)),
        context.device.finish,
    )
