"""The training loop: the module to read first.

plan -> own micro-batches -> forward and backward of each -> partial gradients
     -> exchange -> optimizer -> next step

`training.trainer` has the parts used here, `training.build` puts them together.
"""

import resource
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from samestep.config.model import CustomLoss
from samestep.core.metric import COUNTED
from samestep.core.ownership import lengths
from samestep.core.progress import MetricSums
from samestep.exchange import Summands
from samestep.kernels.interface import ARITHMETIC
from samestep.messages.training import (
    EpochRecord,
    Evicted,
    Finished,
    NoTargets,
    Rebalanced,
    SnapshotSaved,
    Stopped,
    StragglerFound,
)
from samestep.optim import gradients
from samestep.portable.passes import RecordedPasses
from samestep.state import dtypes
from samestep.state.fingerprint import fingerprint
from samestep.system.json_values import JsonObject
from samestep.training.cadence import Decision
from samestep.training.progress import (
    epoch_record,
    own_metrics,
    started,
    step_record,
)
from samestep.training.timing import PHASES, Times
from samestep.training.trainer import Trainer, steps_per_report
from samestep.user_code.references import names
from samestep.verification import replicas


def train(trainer: Trainer) -> bool:
    """All workers: train the epochs that are left, then test the model.

    Returns False if the training was asked to stop before its end.
    """
    progress, clock = trainer.progress, trainer.monitor.clock
    trainer.report(started(trainer))
    _probe(trainer)
    while not is_over(trainer):
        decision, record = train_epoch(trainer)
        if record:
            _close_epoch(trainer, record)
        # A worker that is too slow need not leave after the last step.
        last = is_over(trainer)
        leaves = decision.leaving is not None
        if decision.save or decision.stop or last or leaves:
            _save(trainer)
        if decision.stop or (leaves and not last):
            _report_stop(trainer, decision.leaving)
            return False
    if trainer.probe is not None:
        trainer.probe.finish()
    clock.end()
    trainer.replica.averages.finish(progress.stopping)
    _report_result(trainer)
    return True


def is_over(trainer: Trainer) -> bool:
    """Return whether the last step was taken or early stopping ends the training.

    All workers find the same, since it depends on merged numbers only.
    """
    recipe, progress = trainer.recipe, trainer.progress
    done = progress.step == recipe.epochs * trainer.samples.plan.steps_per_epoch
    return done or progress.stopping.is_over(recipe.early_stopping)


def train_epoch(trainer: Trainer) -> tuple[Decision, EpochRecord | None]:
    """All workers: train to the end of the epoch, or until the workers decide to stop.

    Returns the last decision, and the epoch's record, None if it is not complete.
    """
    progress, clock = trainer.progress, trainer.monitor.clock
    num_steps = trainer.samples.plan.steps_per_epoch
    epoch, start = divmod(progress.step, num_steps)
    clock.take()
    faults, began = _minor_faults(), clock.taken
    sync_at = start + 1
    for step in range(start, num_steps):
        train_step(trainer, progress.step)
        progress.step += 1
        # Not after every step: each merge makes all workers wait for the slowest.
        if step + 1 not in (sync_at, num_steps) and not _is_logged(trainer, step + 1):
            continue
        decision = sync_metrics(trainer, epoch, step + 1)
        sync_at = step + 1 + decision.steps
        progress.seconds += clock.taken - began
        began = clock.taken
        if step + 1 < num_steps:
            if decision.stop or decision.leaving is not None:
                break
            if decision.save:
                _save(trainer)
    if progress.step % num_steps:  # stopped within the epoch
        return decision, None
    times = trainer.monitor.epoch_times.take()
    faults_per_step = (_minor_faults() - faults) / (num_steps - start)
    data = trainer.samples.data
    return decision, epoch_record(progress, epoch, times, data, faults_per_step)


def train_step(trainer: Trainer, step: int) -> None:
    """All workers: take one optimizer step on one global batch.

    `step` counts from 0 over all epochs. Every worker computes the micro-batches that
    it owns, then updates its slice of the parameters with the gradient of them all.
    """
    recipe, samples, replica = trainer.recipe, trainer.samples, trainer.replica
    exchange, flat, monitor = replica.exchange, replica.flat, trainer.monitor
    trainer.ownership.shuffle(step)
    monitor.begin_step(step, samples.num_targets(step))
    if replica.passes is None:
        compute_micro_batches(trainer, step)
    else:
        run_program(trainer, step, replica.passes)

    monitor.begin_exchange()
    gradient, buffers = _sum(trainer, step)
    # Micro-batches without samples leave the buffers unchanged: they are no update.
    count = samples.num_nonempty_micro_batches(step)
    flat.advance_buffers(buffers, recipe.micro_batches, count)
    monitor.end_exchange()

    replica.optimizer.step(gradient, trainer.learning_rate(step))
    replica.averages.advance(step)
    monitor.end_update()
    exchange.all_gather_parameters()
    monitor.end_step()


def compute_micro_batches(trainer: Trainer, step: int) -> None:
    """Compute the gradients of the micro-batches that this worker owns, one by one."""
    samples, replica, monitor = trainer.samples, trainer.replica, trainer.monitor
    exchange, flat = replica.exchange, replica.flat
    owned = trainer.ownership.micro_batches
    # Losses are sums: divided by one number, uneven micro-batches get the right weight.
    share = 1 / samples.num_targets(step)
    weight = torch.tensor(share, dtype=flat.dtype, device=flat.device)
    for m in range(*owned):
        monitor.begin_micro_batch()
        inputs, targets = samples.draw(step, m, owned)
        flat.restore_buffers()  # each micro-batch begins with those of the last step
        monitor.lap("data")
        with exchange.accumulate(m), dtypes.default(flat.dtype):
            loss, metrics = replica.objective(inputs, targets)
            monitor.lap("forward")
            # `loss.backward(weight)` would import a symbolic algebra for 0.4 s first.
            (loss * weight).backward()
        exchange.after_backward(m)
        monitor.end_micro_batch(m, loss, metrics, len(targets))


def run_program(trainer: Trainer, step: int, passes: RecordedPasses) -> None:
    """Compute them all together, with portable arithmetic."""
    owned, monitor = trainer.ownership.micro_batches, trainer.monitor
    if owned[0] < owned[1]:
        monitor.begin_micro_batch()
    passes.run(step, owned, monitor)
    monitor.end_micro_batches()


def _sum(trainer: Trainer, step: int) -> tuple[Tensor | Summands, Tensor]:
    """All workers: sum gradients and buffers in the order of the canonical tree.

    Portable kernels can take the last sums while they update, unless something needs
    the whole gradient before.
    """
    replica, limit = trainer.replica, trainer.recipe.optimizer.max_grad_norm
    exchange, counts = replica.exchange, COUNTED in trainer.samples.data.own_metrics
    is_needed = counts or limit is not None or exchange.watch.active
    if replica.passes is not None and not is_needed:
        return exchange.summands()
    gradient, buffers = exchange.sum()
    factor, sizes = _rescale(trainer, gradient, step)
    _observe_noise(trainer, gradient, factor, sizes)
    if limit is not None:
        gradients.clip(gradient, limit, exchange, replica.norms)
    return gradient, buffers


def _rescale(
    trainer: Trainer, gradient: Tensor, step: int
) -> tuple[float, Sequence[float]]:
    """All workers: divide the gradient by what the losses counted, if they count.

    Returns the factor, and how many samples each micro-batch weighs.
    """
    plan, data = trainer.samples.plan, trainer.samples.data
    sizes = plan.micro_batch_sizes(step % plan.steps_per_epoch)
    if COUNTED not in data.own_metrics:
        return 1.0, sizes
    num_samples, num_targets = sum(sizes), trainer.samples.num_targets(step)
    factor, weights = gradients.rescale_to_counts(
        gradient, trainer.monitor.counts(), num_targets, num_samples
    )
    if not factor:
        trainer.report(NoTargets(step=trainer.progress.step + 1))
    return factor, weights


def _observe_noise(
    trainer: Trainer, gradient: Tensor, factor: float, sizes: Sequence[float]
) -> None:
    """All workers, in some steps: observe the gradient noise scale.

    Call it after rescaling (by `factor`) and before clipping.
    """
    exchange = trainer.replica.exchange
    if not exchange.watch.active:
        return
    norms = trainer.replica.norms
    estimate = gradients.estimate_noise(gradient, factor, sizes, exchange, norms)
    if estimate is not None:
        trainer.progress.noise.add(*estimate)


def sync_metrics(trainer: Trainer, epoch: int, steps_in_epoch: int) -> Decision:
    """All workers: merge the metrics of the steps since the last call.

    The same merge carries the decision of rank 0, and any worker's request to stop;
    the merged decision is returned. So all workers save, stop and change ownership
    after the same step.
    """
    progress, monitor = trainer.progress, trainer.monitor
    ends = steps_in_epoch == trainer.samples.plan.steps_per_epoch
    steps = monitor.metrics.num_steps
    decision = trainer.ownership.decide(trainer.cadence.decide(steps, ends))
    phases = monitor.take_phases()
    first, end = trainer.ownership.micro_batches
    drawing = phases[PHASES.index("data")]
    trainer.samples.prefetcher.observe(steps * (end - first), drawing, sum(phases))
    sums, times, decision = monitor.sync(phases, decision)
    _rebalance(trainer, steps, times, decision)
    for step in sums:
        progress.epoch.add(step)
        progress.logged.add(step)
    if _is_logged(trainer, steps_in_epoch):
        _report_steps(trainer, epoch)
    if trainer.probe is not None:
        trainer.probe.poll()
    monitor.lap("exchange")
    return decision


def _rebalance(trainer: Trainer, steps: int, times: Times, decision: Decision) -> None:
    """All workers: observe the speeds, and change ownership if rank 0 decided so."""
    ownership, step = trainer.ownership, trainer.progress.step
    if ownership.is_random:
        return
    straggler = ownership.observe(steps, times)
    if straggler is not None:
        trainer.report(StragglerFound(step=step, **vars(straggler)))
    if decision.counts:
        change = ownership.adopt(decision.counts)
        counts = {"before": lengths(change.before), "after": lengths(change.after)}
        trainer.report(Rebalanced(step=step, **{**vars(change), **counts}))


def _close_epoch(trainer: Trainer, record: EpochRecord) -> None:
    """All workers: evaluate, compare the replicas, and report the epoch."""
    stop, stopping = trainer.recipe.early_stopping, trainer.progress.stopping
    replica = trainer.replica
    with replica.averages.applied():
        metrics = _evaluate(trainer, "validation")
        if stop and stopping.observe(stop, metrics[stop.metric], record.epoch):
            replica.averages.keep_best(stopping)
        sha256 = replicas.common_fingerprint(
            replica.model,
            trainer.topology.rank,
            replica.exchange,
            is_own=bool(names(trainer.recipe)),
        )
    trainer.report(replace(record, validation_metrics=metrics, weights_sha256=sha256))
    _probe(trainer)
    trainer.progress.begin_epoch()


def _probe(trainer: Trainer) -> None:
    """All workers: check that user code gives the same result when called again."""
    if trainer.probe is not None:
        trainer.probe.run(trainer.progress.step)


def _save(trainer: Trainer) -> None:
    """All workers: save a snapshot; the supervisor may make a checkpoint of it."""
    step, clock = trainer.progress.step, trainer.monitor.clock
    start = clock.lap("other")
    trainer.monitor.faults.at("snapshot", step)
    slot = trainer.save()
    seconds = clock.lap("snapshot") - start
    trainer.cadence.saved(seconds)
    trainer.report(SnapshotSaved(slot=slot, step=step, seconds=seconds))


def _evaluate(trainer: Trainer, split: str) -> dict[str, float]:
    """All workers: return the loss and metrics of a split, empty without samples."""
    data = trainer.samples.data
    if len(data.splits[split]) == 0:
        return {}
    means = trainer.evaluator.evaluate(split).means(data.metrics)
    return {f"{split}_{key}": value for key, value in means.items()}


def _inspect(trainer: Trainer, split: str) -> JsonObject:
    """All workers: return how a classifier answers for single samples of a split."""
    data = trainer.samples.data
    if data.task != "classification" or not len(data.splits[split]):
        return {}
    if isinstance(trainer.recipe.loss, CustomLoss):  # its outputs may be no logits
        return {}
    details = trainer.evaluator.inspect(split)
    return {f"{split}_{key}": value for key, value in details.items()}


def _report_steps(trainer: Trainer, epoch: int) -> None:
    """Report the steps since the last record."""
    progress, balancer = trainer.progress, trainer.ownership.balancer
    lr = trainer.learning_rate(progress.step - 1)
    times = trainer.monitor.logged_times.take()
    record = step_record(progress, epoch, lr, times, trainer.samples.data)
    shares = lengths(balancer.owned)
    trainer.report(replace(record, speeds=balancer.speeds, shares=shares))
    progress.logged = MetricSums()


def _report_stop(trainer: Trainer, leaving: int | None) -> None:
    """Report an end before the last step: as asked, or to go on without a worker."""
    step, speeds = trainer.progress.step, trainer.ownership.balancer.speeds
    if leaving is None:
        trainer.report(Stopped(step=step))
    else:
        trainer.report(Evicted(step=step, worker=leaving, speeds=speeds))


def _report_result(trainer: Trainer) -> None:
    """All workers: test the final model, and report the result."""
    data, stopping = trainer.samples.data, trainer.progress.stopping
    # Taken before the test: a model may change its buffers in evaluation.
    sha256 = fingerprint(trainer.replica.model.state_dict())
    is_early = trainer.recipe.early_stopping is not None
    trainer.report(
        Finished(
            test_metrics={**_evaluate(trainer, "test"), **_inspect(trainer, "test")},
            weights_sha256=sha256,
            balance=trainer.ownership.balancer.summary(),
            data=data.facts,
            own_metrics=own_metrics(data),
            arithmetic=ARITHMETIC if trainer.recipe.is_portable else "torch",
            best_epoch=stopping.best_epoch if is_early else None,
        )
    )


def _is_logged(trainer: Trainer, steps_in_epoch: int) -> bool:
    return (
        steps_in_epoch % steps_per_report(trainer.samples.plan) == 0
        or steps_in_epoch == trainer.samples.plan.steps_per_epoch
    )


def _minor_faults() -> int:
    """Return the page faults of this process that needed no I/O."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
