"""Where a worker is put together: for a training, a measurement or an evaluation."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from samestep.config.recipe import Recipe
from samestep.core.balancer import Balancer
from samestep.core.metric import num_cells
from samestep.core.ownership import Share, contiguous, shares
from samestep.core.plan import derive_seed
from samestep.core.progress import Progress
from samestep.core.topology import Topology
from samestep.data.prefetch import HelperProcess, MicroBatches, Prefetcher
from samestep.exchange import Exchange
from samestep.kernels.library import load_kernels
from samestep.messages.job import Setup
from samestep.messages.training import (
    Prefetching,
    Traced,
    UnusedParameters,
    WorkerWarning,
)
from samestep.models import compiling
from samestep.models.device import Device
from samestep.models.objective import Objective
from samestep.optim.averaging import WeightAverages
from samestep.optim.gradients import Norms
from samestep.optim.optimizer import SliceOptimizer
from samestep.optim.param_groups import slices
from samestep.portable.evaluation import RecordedEvaluation
from samestep.portable.norms import block_norms, move_average
from samestep.portable.optimizer import PortableOptimizer
from samestep.portable.passes import RecordedPasses, training_program
from samestep.state import frozen
from samestep.state.flat import Flat
from samestep.state.snapshot import Snapshots
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import COMPILING, MEETING, Heartbeat
from samestep.training.cadence import Cadence
from samestep.training.components import (
    Components,
    ModelAndData,
    load_and_build,
    load_trained,
)
from samestep.training.evaluate import Evaluator
from samestep.training.metrics import MetricsBuffer
from samestep.training.monitor import StepMonitor
from samestep.training.timing import PHASES, Clock, Tracer
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
from samestep.verification.beside_torch import BesideTorch
from samestep.verification.mutation_check import MutationCheck
from samestep.verification.probe import Probe, Witness


Connect = Callable[[Flat, list[Share]], Exchange]
"""Make the exchange, from a model's vectors and all workers' micro-batches."""


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


def build_trainer(context: WorkerContext, samples_sha256: str = "") -> Trainer:
    """All workers: build the parts, and go on from the newest snapshot, if any.

    `samples_sha256` is that of the samples that the run began with; empty: not known.
    Raises DataError, RecipeError, OwnCodeError.
    """
    setup, recipe = context.setup, context.recipe
    topology, heartbeat, start = context.topology, context.heartbeat, time.monotonic()
    components = load_and_build(
        recipe, context.user_code, setup.max_steps, context.device, heartbeat.enter
    )
    seconds = time.monotonic() - start
    flat = components.flat
    # The supervisor completes files of weights with them; snapshots leave them out.
    if topology.is_leader and "constants" in context.fds:
        frozen.write(context.fds["constants"], flat.constants)
    balancer = _balancer(setup, recipe.micro_batches, topology.workers)
    heartbeat.enter(MEETING)
    exchange = context.connect(flat, balancer.owned)
    # Before parameters are shared: afterwards a difference would be hidden.
    check = startup.StartupCheck(recipe, topology.rank, exchange)
    sha256 = check.check_data(components.data)
    startup.check_resumed(samples_sha256, sha256)
    check.check_model(components.model)
    samples = _samples(context, components)
    replica = _replica(context, components, exchange, samples)
    trainer = Trainer(
        recipe=recipe,
        topology=topology,
        report=context.report if topology.is_leader else lambda _: None,
        samples=samples,
        replica=replica,
        ownership=Ownership(
            topology.rank,
            exchange,
            balancer,
            is_random=setup.balance == "random",
            micro_batches=balancer.owned[topology.rank],
        ),
        evaluator=_evaluator(context, components, exchange, flat, exchange.parameters),
        probe=_probe(context, components, samples, exchange, seconds),
        monitor=_monitor(context, components, exchange),
        cadence=Cadence(heartbeat, setup.snapshot_seconds),
        snapshots=Snapshots(
            context.fds["snapshots"], flat.layout, topology.local_workers
        ),
        progress=Progress(phases=[0.0] * len(PHASES), counts=flat.counts),
        conditions=startup.conditions(recipe, sha256),
    )
    trainer.restore()
    if components.unused and trainer.progress.step == 0:
        trainer.report(UnusedParameters(parameters=list(components.unused)))
    return trainer


def build_evaluator(context: WorkerContext, split: str, model_file: Path) -> Evaluator:
    """All workers: load the data, and the weights of a model file, to evaluate them.

    Raises DataError, OwnCodeError, RunError.
    """
    heartbeat, workers = context.heartbeat, context.topology.workers
    parts = load_trained(
        context.recipe,
        context.user_code,
        split,
        model_file,
        context.device,
        heartbeat.enter,
    )
    heartbeat.enter(MEETING)
    flat = Flat(parts.model)
    exchange = context.connect(flat, shares(workers, workers))
    parameters = torch.zeros(flat.size, dtype=flat.dtype)
    if context.recipe.is_portable:
        flat.bind(parameters, write=True)
    return _evaluator(context, parts, exchange, flat, parameters)


def _balancer(setup: Setup, micro_batches: int, workers: int) -> Balancer:
    owned = shares(micro_batches, workers)
    # A fixed balance was given for another number of workers if some have left since.
    if isinstance(setup.balance, list) and len(setup.balance) == workers:
        owned = contiguous(setup.balance)
    return Balancer(
        micro_batches,
        owned,
        is_live=setup.balance == "auto" and workers > 1,
        drop_stragglers_below=setup.drop_stragglers_below,
    )


def _replica(
    context: WorkerContext,
    components: Components,
    exchange: Exchange,
    samples: Samples,
) -> Replica:
    """All workers: bind the model to the exchange, and the optimizer to its slice."""
    recipe, flat, objective = context.recipe, components.flat, components.objective()
    if recipe.is_portable:
        replica = _portable_replica(components, objective, exchange, samples)
        if context.topology.is_leader and "model" in names(recipe):
            _check_program(components, objective, exchange, samples)
        return replica
    # Every pass uses each layer of a built-in family once, so gradients may be sent
    # while others are computed. The user's own model may branch.
    attached = exchange.attach(objective, overlap="model" not in names(recipe))
    if recipe.compile:
        context.heartbeat.enter(COMPILING)
        compiling.prepare(objective, components.data, components.plan, flat)
    optimizer = SliceOptimizer(
        recipe.optimizer,
        exchange.parameters[slice(*exchange.owned)],
        exchange.states,
        slices(recipe.optimizer, flat.layout, exchange.owned),
    )
    averages = WeightAverages(recipe, flat, exchange)
    return Replica(components.model, attached, flat, exchange, optimizer, averages)


def _portable_replica(
    components: Components, objective: Objective, exchange: Exchange, samples: Samples
) -> Replica:
    """All workers: do the same for portable arithmetic.

    Raises NotPortable, KernelError.
    """
    recipe, flat, kernels = components.recipe, components.flat, load_kernels()
    exchange.attach(objective, overlap=False)
    passes = RecordedPasses(
        components.model,
        components.data,
        components.plan,
        recipe,
        flat,
        exchange,
        samples.draw,
        kernels,
    )
    optimizer = PortableOptimizer(
        kernels,
        recipe.optimizer,
        exchange.parameters[slice(*exchange.owned)],
        exchange.states,
        slices(recipe.optimizer, flat.layout, exchange.owned),
        passes.weights,
    )
    norms = Norms(
        partial(block_norms, kernels), lambda cells: math.fsum(cells.tolist())
    )
    averages = WeightAverages(recipe, flat, exchange, partial(move_average, kernels))
    return Replica(
        components.model,
        objective,
        flat,
        exchange,
        optimizer,
        averages,
        norms,
        passes,
    )


def _check_program(
    components: Components, objective: Objective, exchange: Exchange, samples: Samples
) -> None:
    """Compare the program of the user's own model with PyTorch. Raises NotPortable."""
    recipe = components.recipe
    record = partial(
        training_program,
        components.model,
        components.data,
        recipe.loss,
        components.flat,
    )
    beside = BesideTorch(
        record,
        objective,
        components.flat,
        exchange.parameters,
        load_kernels(),
        derive_seed(recipe.seed, "step", 0, 0),
    )
    inputs, targets = samples.prefetcher.replay(0, 0)
    if isinstance(targets, Tensor):  # mixed targets are not compared (own-code.md)
        beside.check(inputs, targets)


def _samples(context: WorkerContext, components: Components) -> Samples:
    data, plan = components.data, components.plan
    message = Prefetching(worker=context.topology.rank)
    source = MicroBatches(data, plan, bool(names(context.recipe)))
    prefetcher = Prefetcher(source, context.helper, partial(context.report, message))
    return Samples(data, plan, prefetcher, context.device)


def _evaluator(
    context: WorkerContext,
    parts: ModelAndData,
    exchange: Exchange,
    flat: Flat,
    parameters: Tensor,
) -> Evaluator:
    recipe, recorded = context.recipe, None
    if recipe.is_portable:
        recorded = RecordedEvaluation(
            parts.model,
            parts.data,
            recipe.loss,
            flat,
            parameters,
            load_kernels(),
            recipe.evaluation_batch,
        )
    rank = context.topology.rank
    return Evaluator(parts, rank, exchange, context.heartbeat, context.device, recorded)


def _probe(
    context: WorkerContext,
    components: Components,
    samples: Samples,
    exchange: Exchange,
    build_seconds: float,
) -> Probe | None:
    """Return the probe of user code; built-in code needs none."""
    if not context.setup.probe or not names(context.recipe):
        return None
    report, rank = context.report, context.topology.rank
    return Probe(
        components.replay(samples.prefetcher.replay, context.device),
        exchange,
        exchange.parameters,
        rank,
        context.heartbeat,
        lambda text: report(WorkerWarning(worker=rank, text=text)),
        context.witness,
        # The witness must load and build, too, beside workers that already compute.
        context.setup.hang_timeout + 3 * build_seconds,
    )


def _monitor(
    context: WorkerContext, components: Components, exchange: Exchange
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
        _clock(context),
        context.heartbeat,
        context.faults,
        metrics,
        _mutation_check(context.recipe, components),
        exchange,
        context.device,
    )


def _mutation_check(recipe: Recipe, components: Components) -> MutationCheck | None:
    """Return the check of the user's own model; built-in ones need none."""
    name = names(recipe).get("model")
    if name is None:
        return None
    return MutationCheck(components.model, components.flat, title(name, "model"))


def _clock(context: WorkerContext) -> Clock:
    if not context.setup.profile:
        return Clock()
    report, rank = context.report, context.topology.rank
    return Tracer(
        context.setup.profile,
        lambda spans: report(Traced(worker=rank, spans=spans)),
        context.device.finish,
    )
