"""The training: the page to read first.

plan -> own micro-batches -> forward and backward of each -> partials -> exchange
     -> optimizer -> next step
"""

import math
import resource
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from samestep.config.model import CustomLoss
from samestep.core import gradient_noise
from samestep.core.balancer import StepWindow, random_ownership
from samestep.core.metric import COUNTED
from samestep.core.ownership import contiguous
from samestep.core.plan import derive_seed
from samestep.state import dtypes
from samestep.state.fingerprint import fingerprint
from samestep.state.flat import block_norms
from samestep.state.layout import BLOCK
from samestep.training.cadence import Decision
from samestep.training.metrics import Sums, tree_sum
from samestep.training.progress import Record, epoch_record, own_metrics, step_record
from samestep.training.timing import PHASES, Times
from samestep.training.trainer import Trainer, save
from samestep.user_code.references import names
from samestep.verification import replicas


def train(trainer: Trainer) -> bool:
    """All workers: the epochs that are left, then the test; False if told to stop."""
    recipe, plan, progress = trainer.recipe, trainer.plan, trainer.progress
    trainer.report(
        {
            "type": "started",
            "step": progress.step,
            "steps_per_epoch": plan.steps_per_epoch,
            "train_samples": plan.num_samples,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "layout": trainer.flat.layout.to_dict(),
            "conditions": trainer.conditions,
            "torch": torch.__version__,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
        }
    )
    _probe(trainer)
    while not is_over(trainer):
        told, record = train_epoch(trainer)
        if record:
            _close_epoch(trainer, record)
        last = is_over(trainer)
        leaves = told.leaving is not None
        if told.save or told.stop or last or leaves:
            _save(trainer)
        if told.stop or (leaves and not last):
            _part(trainer, told.leaving)
            return False
    if trainer.probe is not None:
        trainer.probe.finish()
    trainer.clock.end()
    trainer.kept.finish(progress.stopping)
    sha256 = fingerprint(trainer.model.state_dict())
    test = _evaluated(trainer, "test") | _inspected(trainer, "test")
    balance = trainer.balancer.summary()
    best = {"best_epoch": progress.stopping.best_epoch}
    trainer.report(
        {
            "type": "finished",
            **test,
            "weights_sha256": sha256,
            "balance": balance,
            "data": trainer.data.facts,
            **own_metrics(trainer.data),
            **(best if recipe.early_stopping else {}),
        }
    )
    return True


def is_over(trainer: Trainer) -> bool:
    """After the last step, or early; all workers find the same."""
    recipe, progress = trainer.recipe, trainer.progress
    done = progress.step == recipe.epochs * trainer.plan.steps_per_epoch
    return done or progress.stopping.is_over(recipe.early_stopping)


def _close_epoch(trainer: Trainer, record: Record) -> None:
    """All workers: what came out of an epoch."""
    stop, stopping = trainer.recipe.early_stopping, trainer.progress.stopping
    with trainer.kept.shown():
        record |= _evaluated(trainer, "validation")
        if stop and stopping.note(stop, record[stop.metric], record["epoch"]):
            trainer.kept.keep(stopping)
        record["weights_sha256"] = replicas.agreed(
            trainer.model,
            trainer.topology.rank,
            trainer.exchange,
            is_own=bool(names(trainer.recipe)),
        )
    trainer.report(record)
    _probe(trainer)
    trainer.progress.begin_epoch()


def _probe(trainer: Trainer) -> None:
    """All workers: does own code compute the same when it computes again?"""
    if trainer.probe is not None:
        trainer.probe.run(trainer.progress.step)


def train_epoch(trainer: Trainer) -> tuple[Decision, Record]:
    """All workers: the rest of an epoch, or until all are told to stop.

    Returns the last decision, and the epoch's record, empty if it is not complete.
    """
    progress, num_steps = trainer.progress, trainer.plan.steps_per_epoch
    epoch, start = divmod(progress.step, num_steps)
    trainer.clock.take()
    faults, began = _minor_faults(), trainer.clock.taken
    pause = start + 1
    for step in range(start, num_steps):
        train_step(trainer, progress.step, step)
        progress.step += 1
        if step + 1 not in (pause, num_steps) and not _is_logged(trainer, step + 1):
            continue
        told = sync_metrics(trainer, epoch, step + 1)
        pause = step + 1 + told.steps
        progress.seconds += trainer.clock.taken - began
        began = trainer.clock.taken
        if step + 1 < num_steps:
            if told.stop or told.leaving is not None:
                break
            if told.save:
                _save(trainer)
    if progress.step % num_steps:
        return told, {}
    times = trainer.stopwatch.take_epoch()
    record = epoch_record(progress, epoch, times, trainer.data)
    record["minor_faults_per_step"] = (_minor_faults() - faults) / (num_steps - start)
    return told, record


def sync_metrics(trainer: Trainer, epoch: int, steps_in_epoch: int) -> Decision:
    """All workers: adds up the steps since the last time; returns what to do."""
    progress = trainer.progress
    ends = steps_in_epoch == trainer.plan.steps_per_epoch
    steps = trainer.ledger.rows
    decision = _with_ownership(trainer, trainer.cadence.decide(steps, ends))
    trainer.heartbeat.at_barrier()
    phases = trainer.clock.take()
    own = steps * (trainer.owned[1] - trainer.owned[0])
    trainer.feed.observe(own, phases[PHASES.index("data")], sum(phases))
    sums, times, told = trainer.ledger.close(phases, decision)
    times.bytes, trainer.bytes = trainer.bytes, 0
    times.network_bytes, trainer.network_bytes = trainer.network_bytes, 0
    trainer.stopwatch.add(times)
    _balance(trainer, steps, times, told)
    for step in sums:
        progress.epoch.add(step)
        progress.logged.add(step)
    if _is_logged(trainer, steps_in_epoch):
        lr = trainer.learning_rate(progress.step - 1)
        times = trainer.stopwatch.take_logged()
        record = step_record(progress, epoch, lr, times, trainer.data)
        record["speeds"] = trainer.balancer.speeds
        record["shares"] = [end - first for first, end in trainer.balancer.owned]
        trainer.report(record)
        progress.logged = Sums()
    if trainer.probe is not None:
        trainer.probe.poll()
    trainer.clock.lap("exchange")
    return told


def _with_ownership(trainer: Trainer, decision: Decision) -> Decision:
    """All workers: with what its balancer has found since; that of rank 0 counts."""
    change = trainer.balancer.proposal
    counts = tuple(end - first for first, end in change.after) if change else ()
    return replace(decision, leaving=trainer.balancer.straggler_to_drop, counts=counts)


def _balance(trainer: Trainer, steps: int, times: Times, told: Decision) -> None:
    """All workers: ownership follows the speeds, as rank 0 has told."""
    if trainer.is_random:
        return
    of = dict(zip(PHASES, times.seconds.T, strict=True))
    compute = of["data"] + of["forward"] + of["backward"]
    trainer.balancer.observe(
        StepWindow(
            steps,
            times.seconds[0].sum().item(),
            compute.tolist(),
            of["data"].tolist(),
            of["wait"].tolist(),
            of["optimizer"].tolist(),
        )
    )
    step, straggler = trainer.progress.step, trainer.balancer.straggler
    if straggler is not None:
        trainer.report({"type": "hindered", "step": step, **asdict(straggler)})
    if told.counts:
        change = trainer.balancer.adopt(contiguous(told.counts))
        trainer.assign(change.after)
        trainer.report({"type": "rebalanced", "step": step, **change.to_dict()})


def train_step(trainer: Trainer, step: int, step_in_epoch: int) -> None:
    """All workers: one optimizer step on one global batch."""
    recipe, plan, clock = trainer.recipe, trainer.plan, trainer.clock
    size = plan.batch_size(step_in_epoch) * trainer.data.targets_per_sample
    dtype = trainer.flat.dtype
    weight = torch.tensor(1 / size, dtype=dtype, device=trainer.device.target)
    row = trainer.ledger.open(step, size)
    trainer.heartbeat.begin(step)
    clock.begin(step)
    if trainer.is_random:
        workers = trainer.exchange.workers
        trainer.assign(random_ownership(recipe.micro_batches, workers, step))
    trainer.exchange.watch.begin(step)
    arrived = clock.lap("other")
    for m in range(*trainer.owned):
        trainer.heartbeat.beat()
        trainer.faults.at("forward", step)
        trainer.device.seed(derive_seed(recipe.seed, "step", step, m))
        inputs, targets = trainer.device.to_device(
            *trainer.feed.draw(step, m, trainer.owned)
        )
        trainer.flat.restore_buffers()
        clock.lap("data")
        with trainer.exchange.accumulate(m), dtypes.default(dtype):
            loss, metrics = trainer.objective(inputs, targets)
            clock.lap("forward")
            loss.backward(weight)
        trainer.exchange.after_backward(m)
        if trainer.mutation_check is not None:
            trainer.mutation_check.check(passes=int(len(targets) > 0))
        trainer.ledger.note(row, m, loss.item(), metrics.tolist())
        arrived = clock.lap("backward")
    trainer.ledger.arrive(row, arrived)
    trainer.faults.at("exchange", step)
    trainer.heartbeat.at_barrier()
    gradient, buffers = trainer.exchange.sum()
    divided = _divide(trainer, gradient, row, step_in_epoch)
    trainer.flat.advance_buffers(
        buffers, recipe.micro_batches, plan.num_pieces(step_in_epoch)
    )
    if trainer.exchange.watch.active:
        _estimate_noise(trainer, gradient, *divided)
    if recipe.optimizer.max_grad_norm is not None:
        _clip(trainer, gradient, recipe.optimizer.max_grad_norm)
    trainer.bytes += trainer.exchange.bytes_per_step
    trainer.network_bytes += trainer.exchange.network_bytes_per_step
    trainer.device.finish()  # or the next step would seem to compute for so long
    clock.lap("exchange")
    trainer.faults.at("update", step)
    trainer.update.step(gradient, trainer.learning_rate(step))
    trainer.kept.advance(step)
    clock.lap("optimizer")
    trainer.heartbeat.at_barrier()
    trainer.exchange.all_gather_parameters()
    clock.lap("exchange")


def _divide(
    trainer: Trainer, gradient: Tensor, row: int, step_in_epoch: int
) -> tuple[float, Sequence[float]]:
    """All workers: the gradient by what the losses counted, if they do.

    Until now it was divided by the number of all targets. Returns the factor, and how
    many samples each micro-batch is worth. If nothing counts, the gradient is zero.
    """
    sizes = trainer.plan.micro_batch_sizes(step_in_epoch)
    if COUNTED not in trainer.data.own_metrics:
        return 1.0, sizes
    counts, samples = trainer.ledger.counts(row), sum(sizes)
    total = tree_sum(counts).item()
    if not total:
        gradient.zero_()
        trainer.report({"type": "no targets", "step": trainer.progress.step + 1})
        return 0.0, [0.0] * len(sizes)
    factor = samples * trainer.data.targets_per_sample / total
    gradient.mul_(factor)
    return factor, (counts * (samples / total)).tolist()


def _clip(trainer: Trainer, gradient: Tensor, most: float) -> None:
    """All workers: scales the gradient in place to a global L2 norm of at most `most`.

    Gradient clipping: Pascanu et al. 2013.
    """
    norm = math.sqrt(_squared_norm(trainer, gradient))
    if norm > most:
        gradient.mul_(most / norm)


def _squared_norm(trainer: Trainer, gradient: Tensor) -> float:
    """All workers: of the whole gradient, of which each has at least its own slice.

    The squares are summed by blocks of the flat vector, whoever owns them.
    """
    exchange = trainer.exchange
    cells = torch.zeros(trainer.flat.size // BLOCK, dtype=torch.float64)
    first, end = (cut // BLOCK for cut in exchange.owned)
    cells[first:end] = block_norms(gradient)
    return exchange.merge_slices(cells).sum().item()


def _estimate_noise(
    trainer: Trainer, gradient: Tensor, factor: float, sizes: Sequence[float]
) -> None:
    """All workers: one more observation of the gradient noise scale.

    The `factor` is what the gradient was multiplied by after the exchange.
    """
    exchange = trainer.exchange
    squares = (exchange.merge(exchange.watch.squares) * factor**2).tolist()
    whole = _squared_norm(trainer, gradient)
    if sum(size > 0 for size in sizes) > 1:
        trainer.progress.noise.add(*gradient_noise.estimate(squares, sizes, whole))


def _part(trainer: Trainer, worker: int | None) -> None:
    """All workers end here, after a snapshot: as asked, or to go on without one."""
    speeds, step = trainer.balancer.speeds, trainer.progress.step
    if worker is None:
        trainer.report({"type": "stopped", "step": step})
    else:
        fields = {"step": step, "worker": worker, "speeds": speeds}
        trainer.report({"type": "evicted", **fields})


def _save(trainer: Trainer) -> None:
    """All workers: a snapshot, of which the supervisor may make a checkpoint."""
    start = trainer.clock.lap("other")
    trainer.faults.at("snapshot", trainer.progress.step)
    slot = save(trainer)
    seconds = trainer.clock.lap("snapshot") - start
    trainer.cadence.saved(seconds)
    step = trainer.progress.step
    trainer.report({"type": "snapshot", "slot": slot, "step": step, "seconds": seconds})


def _is_logged(trainer: Trainer, steps_in_epoch: int) -> bool:
    return (
        steps_in_epoch % trainer.steps_per_report == 0
        or steps_in_epoch == trainer.plan.steps_per_epoch
    )


def _evaluated(trainer: Trainer, name: str) -> dict[str, Any]:
    if len(trainer.data.splits[name]) == 0:
        return {}
    means = trainer.evaluator.evaluate(name).means(trainer.data.metrics)
    return {f"{name}_{key}": value for key, value in means.items()}


def _inspected(trainer: Trainer, name: str) -> dict[str, Any]:
    if trainer.data.task != "classification" or not len(trainer.data.splits[name]):
        return {}
    if isinstance(trainer.recipe.loss, CustomLoss):  # its outputs may be no logits
        return {}
    found = trainer.evaluator.inspect(name)
    return {f"{name}_{key}": value for key, value in found.items()}


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
