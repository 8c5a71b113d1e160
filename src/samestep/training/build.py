"""Where a worker is put together: for a training, a measurement or an evaluation."""

import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from samestep.core.balancer import Balancer
from samestep.core.lr_range import LrRange
from samestep.core.metric import num_cells
from samestep.core.ownership import contiguous, shares, spaced
from samestep.core.plan import derive_seed
from samestep.core.progress import Progress
from samestep.data.augment import NONE
from samestep.data.prefetch import MicroBatches, Prefetcher
from samestep.data.sources.user_dataset import given_of, is_in_memory
from samestep.exchange import Exchange
from samestep.exchange.autograd import AutogradPasses
from samestep.exchange.compression import Compression
from samestep.kernels.library import load_kernels
from samestep.kernels.program import Program
from samestep.messages.job import Setup
from samestep.messages.training import (
    Prefetching,
    Traced,
    UnusedParameters,
    WorkerWarning,
)
from samestep.models import compiling
from samestep.models.objective import Objective, without_smoothing
from samestep.optim.averaging import WeightAverages
from samestep.optim.custom import CustomOptimizer
from samestep.optim.gradients import Norms
from samestep.optim.optimizer import Optimizer, SliceOptimizer
from samestep.optim.param_groups import slices
from samestep.portable.evaluation import RecordedEvaluation
from samestep.portable.norms import block_norms, move_average
from samestep.portable.optimizer import PortableOptimizer
from samestep.portable.passes import RecordedPasses
from samestep.state import frozen
from samestep.state.flat import Flat
from samestep.state.snapshot import Snapshots
from samestep.system.heartbeat import COMPILING, MEETING
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
from samestep.training.timing import PHASES, clock_for
from samestep.training.trainer import (
    Ownership,
    Replica,
    Samples,
    Trainer,
    WorkerContext,
    steps_per_report,
)
from samestep.user_code.callbacks import Callbacks
from samestep.user_code.references import names
from samestep.verification import schedule, startup
from samestep.verification.beside_torch import BesideTorch
from samestep.verification.mutation_check import MutationCheck
from samestep.verification.one_by_one import passes_for
from samestep.verification.probe import Probe
from samestep.verification.second_worker import Verifier


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
    flat, faults = components.flat, context.faults
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
    schedule.check(components.factor, recipe, components.plan, topology.rank, exchange)
    samples = _samples(context, components)
    replica = _replica(context, components, exchange, samples)
    callbacks = _callbacks(context)
    place = topology.rank, flat, exchange, heartbeat, faults
    trainer = Trainer(
        recipe=recipe,
        topology=topology,
        report=context.report if topology.is_leader else lambda _: None,
        samples=samples,
        replica=replica,
        passes=passes_for(
            setup.ledger, replica.passes, flat, exchange, recipe.compression
        ),
        ownership=Ownership(
            topology.rank, exchange, balancer, is_random=setup.balance == "random"
        ),
        evaluator=_evaluator(context, components, exchange, flat, exchange.parameters),
        probe=_probe(context, components, samples, exchange, seconds),
        verifier=Verifier(setup.verify, recipe.seed, *place, setup.hosts),
        monitor=_monitor(context, components, exchange),
        cadence=_cadence(context, callbacks),
        snapshots=Snapshots(
            context.fds["snapshots"], flat.layout, topology.local_workers
        ),
        progress=Progress(phases=[0.0] * len(PHASES), counts=flat.counts),
        conditions=startup.conditions(recipe, sha256),
        factor=components.factor,
        kept=spaced(components.num_steps, setup.keep_checkpoints),
        lr_range=LrRange.of(setup.lr_range),
        callbacks=callbacks,
    )
    trainer.restore()
    if components.unused and trainer.progress.step == 0:
        trainer.report(UnusedParameters(parameters=list(components.unused)))
    return trainer


def _callbacks(context: WorkerContext) -> Callbacks | None:
    """Return the user's callbacks, on rank 0."""
    references, is_first = context.setup.callbacks, context.topology.rank == 0
    return Callbacks(references, context.user_code) if references and is_first else None


def _cadence(context: WorkerContext, callbacks: Callbacks | None) -> Cadence:
    setup = context.setup
    return Cadence(
        context.heartbeat,
        setup.snapshot_seconds,
        setup.checkpoint_steps,
        every_step=bool(setup.lr_range or (callbacks and callbacks.follow_steps)),
    )


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
        if {"model", "loss"} & names(recipe).keys():
            if context.topology.is_leader:
                assert isinstance(replica.passes, RecordedPasses)
                program = replica.passes.recorded
                _check_program(program, components, objective, exchange, samples)
            # Others wait: they would load a snapshot into the same parameters.
            exchange.merge(torch.zeros(1, dtype=torch.float64))
        return replica
    # Every pass uses each layer of a built-in family once, so gradients may be sent
    # while others are computed. The user's own model may branch.
    attached = exchange.attach(objective, overlap="model" not in names(recipe))
    passes = AutogradPasses(
        attached,
        objective,
        flat,
        exchange,
        samples.draw,
        samples.num_targets,
        Compression.of(recipe.compression),
    )
    if recipe.compile:
        context.heartbeat.enter(COMPILING)
        compiling.prepare(objective, components.data, components.plan, flat)
        # One machine may have it in its cache, and another compile for minutes.
        context.connect.meet("compiled")
    optimizer = _optimizer(components, exchange)
    averages = WeightAverages(recipe, flat, exchange)
    return Replica(components.model, flat, exchange, optimizer, averages, passes)


def _optimizer(components: Components, exchange: Exchange) -> Optimizer:
    """Return what updates this worker's slice of the parameters."""
    own, owned = components.optimizer, exchange.owned
    place = owned[0] if exchange.is_first else None
    if own is not None:
        states = exchange.states[: len(own.layout.states)]  # then averages of weights
        return CustomOptimizer(own, exchange.parameters, owned, states, place)
    recipe = components.recipe.optimizer
    parameters = exchange.parameters[slice(*owned)]
    parts = slices(recipe, components.flat.layout, owned)
    return SliceOptimizer(recipe, parameters, exchange.states, parts, place)


def _portable_replica(
    components: Components, objective: Objective, exchange: Exchange, samples: Samples
) -> Replica:
    """All workers: do the same for portable arithmetic.

    Raises NotPortable, KernelError.
    """
    recipe, flat, kernels = components.recipe, components.flat, load_kernels()
    exchange.attach(objective, overlap=False)
    passes = RecordedPasses(
        objective,
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
        exchange.owned[0] if exchange.is_first else None,
    )
    norms = Norms(
        partial(block_norms, kernels), lambda cells: math.fsum(cells.tolist())
    )
    averages = WeightAverages(recipe, flat, exchange, partial(move_average, kernels))
    return Replica(
        components.model,
        flat,
        exchange,
        optimizer,
        averages,
        passes,
        norms,
    )


def _check_program(
    program: Program,
    components: Components,
    objective: Objective,
    exchange: Exchange,
    samples: Samples,
) -> None:
    """Compare the program of the user's own model with PyTorch. Raises NotPortable."""
    beside = BesideTorch(
        program,
        objective,
        components.flat,
        exchange.parameters,
        load_kernels(),
        derive_seed(components.recipe.seed, "step", 0, 0),
    )
    inputs, targets = samples.prefetcher.replay(0, 0)
    if isinstance(targets, Tensor):  # mixed targets are not compared (own-code.md)
        beside.check(inputs, targets)


def _samples(context: WorkerContext, components: Components) -> Samples:
    data, plan = components.data, components.plan
    message = Prefetching(worker=context.topology.rank)
    source = MicroBatches(data, plan, bool(names(context.recipe)))
    # To pick samples from arrays is quicker than to receive them.
    is_quick = is_in_memory(data.splits["train"]) and data.augmentation == NONE
    given = given_of(data.splits["train"])
    helper = None if is_quick else context.helper
    is_slow = given is not None and given.has_processes
    prefetcher = Prefetcher(source, helper, partial(context.report, message), is_slow)
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
            parts.objective(without_smoothing(recipe.loss)),
            parts.data,
            flat,
            parameters,
            load_kernels(),
            recipe.evaluation_batch,
            recipe.seed,
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
    plan, report, rank = components.plan, context.report, context.topology.rank
    metrics = MetricsBuffer(
        plan.micro_batches,
        steps_per_report(plan),
        context.topology,
        exchange,
        num_cells(components.data.own_metrics),
        has_micro_batches=context.setup.ledger == "micro-batches",
    )
    return StepMonitor(
        clock_for(
            context.setup.profile,
            lambda spans: report(Traced(worker=rank, spans=spans)),
            context.device.finish,
        ),
        context.heartbeat,
        context.faults,
        metrics,
        MutationCheck.of(context.recipe, components.model, components.flat),
        exchange,
        context.device,
    )
