"""The training loop: the module to read first.

plan -> own micro-batches -> forward and backward of each -> partial gradients
     -> exchange -> optimizer -> next step

`training.trainer` has the parts used here, `training.build` puts them together.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from samestep.config.schedule import PlateauLR
from samestep.core.metric import COUNTED
from samestep.core.ownership import lengths
from samestep.core.progress import MetricSums
from samestep.exchange import Summands
from samestep.kernels.interface import ARITHMETIC
from samestep.messages.training import (
    Finished,
    LrTried,
    NoTargets,
    Rebalanced,
    SnapshotSaved,
    StragglerFound,
)
from samestep.optim import gradients
from samestep.state.fingerprint import fingerprint
from samestep.system.json_values import JsonObject
from samestep.training.cadence import Decision
from samestep.training.progress import (
    epoch_record,
    evaluation_record,
    own_metrics,
    started,
    step_record,
    stopped,
    train_means,
)
from samestep.training.timing import PHASES, Times, minor_faults
from samestep.training.trainer import Trainer
from samestep.user_code.references import all_names
from samestep.verification import replicas, startup


def train(trainer: Trainer) -> bool:
    """All workers: take the steps that are left, then test the model.

    Returns False if the training was asked to stop before its end.
    """
    progress, clock = trainer.progress, trainer.monitor.clock
    trainer.report(started(trainer))
    trainer.notify("on_train_start")
    _probe(trainer)
    while not is_over(trainer):
        faults, start = minor_faults(), progress.step
        decision = train_steps(trainer)
        _report_weights(trainer, (minor_faults() - faults) / (progress.step - start))
        # A worker that is too slow need not leave after the last step.
        last = is_over(trainer)
        leaves = decision.leaving is not None
        if decision.save or decision.stop or last or leaves:
            _save(trainer)
        is_end = last and trainer.progress.step == trainer.until
        if (decision.stop and not is_end) or (leaves and not last):
            trainer.report(stopped(trainer, decision.leaving))
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
    progress, stop = trainer.progress, trainer.recipe.early_stopping
    return trainer.ends(progress.step) or progress.stopping.is_over(stop)


def train_steps(trainer: Trainer) -> Decision:
    """All workers: train to an evaluation or the end of the epoch, or until a stop.

    Returns the last decision.
    """
    progress, clock = trainer.progress, trainer.monitor.clock
    progress.validation_loss = None
    _check_order(trainer)
    clock.take()
    began, sync_at = clock.taken, progress.step + 1
    while True:
        train_step(trainer, progress.step)
        progress.step += 1
        # Not after every step: each merge makes all workers wait for the slowest.
        if progress.step != sync_at and not trainer.is_due:
            continue
        decision = sync_metrics(trainer)
        sync_at = progress.step + decision.steps
        progress.seconds += clock.taken - began
        began = clock.taken
        if trainer.pauses or decision.stop or decision.leaving is not None:
            return decision
        if decision.save:
            _save(trainer)


def _check_order(trainer: Trainer) -> None:
    """All workers: compare what samples come, if user code decides about them."""
    digest = trainer.samples.plan.digest(trainer.progress.step)
    trainer.monitor.heartbeat.at_barrier()
    startup.check_order(digest, trainer.topology.rank, trainer.replica.exchange)


def train_step(trainer: Trainer, step: int) -> None:
    """All workers: take one optimizer step on one global batch.

    `step` counts from 0 over all epochs. Every worker computes the micro-batches that
    it owns, then updates its slice of the parameters with the gradient of them all.
    """
    recipe, samples, replica = trainer.recipe, trainer.samples, trainer.replica
    exchange, flat, monitor = replica.exchange, replica.flat, trainer.monitor
    trainer.ownership.shuffle(step)
    monitor.begin_step(step, samples.num_targets(step))
    if trainer.verifier.is_due(step):
        trainer.verifier.run(step, trainer.passes, monitor)
    else:
        trainer.passes.run(step, trainer.ownership.micro_batches, monitor)

    monitor.begin_exchange()
    gradient, buffers = _sum(trainer, step)
    # Micro-batches without samples leave the buffers unchanged: they are no update.
    count = samples.num_nonempty_micro_batches(step)
    flat.advance_buffers(buffers, recipe.micro_batches, count)
    monitor.end_exchange()

    replica.optimizer.step(gradient, trainer.learning_rate(step))
    replica.averages.advance(step)
    monitor.end_update(replica.optimizer.hashes)
    exchange.all_gather_parameters()
    monitor.end_step()


def _sum(trainer: Trainer, step: int) -> tuple[Tensor | Summands, Tensor]:
    """All workers: sum gradients and buffers in the order of the canonical tree.

    Portable kernels can take the last sums while they update, unless something needs
    the whole gradient before.
    """
    replica, limit = trainer.replica, trainer.recipe.optimizer.max_grad_norm
    exchange, counts = replica.exchange, COUNTED in trainer.samples.data.own_metrics
    is_needed = counts or limit is not None or exchange.watch.active
    if trainer.recipe.is_portable and not is_needed:
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
    sizes = plan.micro_batch_sizes(step)
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


def sync_metrics(trainer: Trainer) -> Decision:
    """All workers: merge the metrics of the steps since the last call.

    The same merge carries the decision of rank 0, and any worker's request to stop;
    the merged decision is returned. So all workers save, stop and change ownership
    after the same step.
    """
    progress, monitor = trainer.progress, trainer.monitor
    ends = trainer.pauses
    steps = monitor.metrics.num_steps
    decision = trainer.ownership.decide(trainer.cadence.decide(steps, ends))
    phases = monitor.take_phases()
    first, end = trainer.ownership.micro_batches
    drawing = phases[PHASES.index("data")]
    trainer.samples.prefetcher.observe(steps * (end - first), drawing, sum(phases))
    merged = monitor.sync(phases, decision)
    _rebalance(trainer, steps, merged.times, merged.decision)
    for step in merged.sums:
        progress.epoch.add(step)
        progress.logged.add(step)
    progress.hashes += "".join(map(str, merged.hashes))
    progress.micro_batch_hashes += merged.micro_batches
    if progress.step == trainer.until or trainer.is_logged:
        _report_steps(trainer)
    if trainer.probe is not None:
        trainer.probe.poll()
    if trainer.cadence.every_step:
        means = merged.sums[-1].means(trainer.samples.data.metrics)
        trainer.notify("on_step_end", means)
        if trainer.lr_range is not None:
            lr = trainer.learning_rate(progress.step - 1)
            trainer.report(LrTried(lr=lr, loss=means["loss"]))
    monitor.lap("exchange")
    return trainer.with_marks(merged.decision)


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


def _report_weights(trainer: Trainer, faults_per_step: float) -> None:
    """All workers: evaluate if it is time, and close the epoch if it ends."""
    if not trainer.pauses:
        return
    progress, data, step = trainer.progress, trainer.samples.data, trainer.progress.step
    epoch = progress.epochs
    metrics, sha256 = _examine(trainer, epoch + 1)
    if metrics and trainer.recipe.evaluation_steps:
        trainer.report(evaluation_record(step, epoch, metrics, sha256, data))
    if trainer.ends_epoch(step) or is_over(trainer):
        times = trainer.monitor.epoch_times.take()
        record = epoch_record(progress, epoch, times, data, faults_per_step)
        record = replace(record, validation_metrics=metrics, weights_sha256=sha256)
        trainer.report(record)
        _probe(trainer)
        progress.begin_epoch()


def _examine(trainer: Trainer, epoch: int) -> tuple[JsonObject, str]:
    """All workers: compare the replicas, and evaluate the model if it is time.

    Returns the validation metrics and the fingerprint; `epoch` counts from 1.
    """
    stop, progress = trainer.recipe.early_stopping, trainer.progress
    replica, metrics = trainer.replica, {}
    with replica.averages.applied():
        if trainer.is_evaluated(progress.step):
            metrics = trainer.evaluator.results("validation")
            # Before a merge, for which all wait: so none changes the weights.
            means = train_means(progress, trainer.samples.data)
            trainer.notify("on_evaluation_end", means | metrics)
            progress.validation_loss = metrics.get("validation_loss")
            schedule = trainer.recipe.schedule
            if isinstance(schedule, PlateauLR):
                progress.plateau.observe(schedule, metrics[schedule.metric])
            value = metrics[stop.metric] if stop else 0.0
            if stop and progress.stopping.observe(stop, value, epoch, progress.step):
                replica.averages.keep_best(progress.stopping)
        sha256 = replicas.common_fingerprint(
            replica.model,
            trainer.topology.rank,
            replica.exchange,
            is_own=bool(all_names(trainer.recipe)),
        )
    return metrics, sha256


def _probe(trainer: Trainer) -> None:
    """All workers: check that user code gives the same result when called again."""
    if trainer.probe is not None:
        trainer.probe.run(trainer.progress.step)


def _save(trainer: Trainer) -> None:
    """All workers: save a snapshot; the supervisor may make a checkpoint of it."""
    progress, clock = trainer.progress, trainer.monitor.clock
    step, epochs = progress.step, progress.epochs
    start = clock.lap("other")
    trainer.monitor.faults.at("snapshot", step)
    slot = trainer.save()
    seconds = clock.lap("snapshot") - start
    trainer.cadence.saved(seconds)
    trainer.notify("on_snapshot")
    trainer.report(SnapshotSaved(slot=slot, step=step, epochs=epochs, seconds=seconds))


def _report_steps(trainer: Trainer) -> None:
    """Report the steps since the last record."""
    progress, balancer = trainer.progress, trainer.ownership.balancer
    last = progress.step - 1
    lr, (epoch, _) = trainer.learning_rate(last), trainer.samples.plan.place(last)
    times = trainer.monitor.logged_times.take()
    record = step_record(progress, epoch, lr, times, trainer.samples.data)
    shares = lengths(balancer.owned)
    trainer.report(replace(record, speeds=balancer.speeds, shares=shares))
    progress.logged = MetricSums()
    progress.hashes = progress.micro_batch_hashes = ""


def _report_result(trainer: Trainer) -> None:
    """All workers: test the final model, and report the result."""
    data, stopping = trainer.samples.data, trainer.progress.stopping
    # Taken before the test: a model may change its buffers in evaluation.
    sha256 = fingerprint(trainer.replica.model.state_dict())
    is_early = trainer.recipe.early_stopping is not None
    metrics = trainer.evaluator.results("test", in_detail=True)
    trainer.notify("on_train_end", metrics)
    trainer.report(
        Finished(
            test_metrics=metrics,
            weights_sha256=sha256,
            balance=trainer.ownership.balancer.summary(),
            data=data.facts,
            own_metrics=own_metrics(data),
            arithmetic=ARITHMETIC if trainer.recipe.is_portable else "torch",
            best_epoch=stopping.best_epoch if is_early else None,
            best_step=stopping.best_step if is_early else None,
        )
    )
