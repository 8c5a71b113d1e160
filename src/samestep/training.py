"""The training: the page to read first.

plan -> own micro-batches -> forward and backward of each -> partials -> exchange
     -> optimizer -> next step
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samestep import dataset, weights
from samestep.evaluation import evaluate
from samestep.exchange import Exchange
from samestep.fingerprint import fingerprint
from samestep.flat import BLOCK, Flat, block_norms
from samestep.metrics import StepLedger, Sums
from samestep.models import mlp
from samestep.objective import Objective
from samestep.plan import Plan, derive_seed, shares
from samestep.recipe import Recipe
from samestep.schedule import learning_rate
from samestep.timing import PHASES, Clock
from samestep.update import Update, num_states


Report = Callable[[dict[str, Any]], None]
Connect = Callable[[Flat, int, list[tuple[int, int]]], Exchange]

REPORTS_PER_EPOCH = 20
MOST_STEPS_PER_REPORT = 50


@dataclass
class Trainer:
    """The parts of one worker."""

    recipe: Recipe
    rank: int
    report: Report

    data: dataset.Dataset
    plan: Plan
    owned: tuple[int, int]

    model: nn.Module
    flat: Flat
    exchange: Exchange
    objective: nn.Module
    update: Update

    clock: Clock
    ledger: StepLedger
    steps_per_report: int

    def learning_rate(self, step: int) -> float:
        """Of one step, counted from 0 over all epochs."""
        recipe, per_epoch = self.recipe, self.plan.steps_per_epoch
        return learning_rate(
            recipe.schedule, recipe.optimizer.lr, step, per_epoch, recipe.epochs
        )


def build(
    recipe: Recipe, rank: int, workers: int, connect: Connect, report: Report
) -> Trainer:
    """All workers. `connect(flat, number of states, shares)` makes the exchange.

    Raises DataError.
    """
    data = dataset.load(recipe.data)
    plan = Plan(
        len(data.splits["train"]),
        recipe.global_batch,
        recipe.micro_batches,
        recipe.seed,
    )
    owned = shares(recipe.micro_batches, workers)
    torch.default_generator.manual_seed(derive_seed(recipe.seed, "model"))
    model = mlp.Mlp(recipe.model, data.num_inputs, data.num_classes)
    flat = Flat(model)
    exchange = connect(flat, num_states(recipe.optimizer), owned)
    objective = exchange.attach(Objective(model, recipe.loss))
    steps_per_report = max(
        1, min(plan.steps_per_epoch // REPORTS_PER_EPOCH, MOST_STEPS_PER_REPORT)
    )
    return Trainer(
        recipe=recipe,
        rank=rank,
        report=report if rank == 0 else lambda _: None,
        data=data,
        plan=plan,
        owned=owned[rank],
        model=model,
        flat=flat,
        exchange=exchange,
        objective=objective,
        update=Update(
            recipe.optimizer,
            exchange.parameters[slice(*exchange.owned)],
            exchange.states,
        ),
        clock=Clock(),
        ledger=StepLedger(recipe.micro_batches, steps_per_report, rank, exchange),
        steps_per_report=steps_per_report,
    )


def train(trainer: Trainer, model_file: Path) -> None:
    """All workers: every epoch, then the test. Rank 0 writes the model."""
    trainer.report(
        {
            "type": "started",
            "steps_per_epoch": trainer.plan.steps_per_epoch,
            "train_samples": trainer.plan.num_samples,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
        }
    )
    for epoch in range(trainer.recipe.epochs):
        record = train_epoch(trainer, epoch)
        record |= _evaluated(trainer, "validation")
        record["weights_sha256"] = weights.agreed(
            trainer.model, trainer.rank, trainer.exchange
        )
        trainer.report(record)
    test = _evaluated(trainer, "test")
    if trainer.rank == 0:
        weights.save(trainer.model, trainer.recipe, model_file)
    sha256 = fingerprint(trainer.model.state_dict())
    trainer.report({"type": "finished", **test, "weights_sha256": sha256})


def train_epoch(trainer: Trainer, epoch: int) -> dict[str, Any]:
    """All workers: one pass over the training samples; returns its record."""
    start, faults = time.perf_counter(), _minor_faults()
    trainer.clock.take()
    order = trainer.plan.order(epoch)
    num_steps = trainer.plan.steps_per_epoch
    total, seconds = Sums(), torch.zeros(trainer.exchange.workers, len(PHASES))
    for step in range(num_steps):
        train_step(trainer, order, epoch * num_steps + step, step)
        if (step + 1) % trainer.steps_per_report == 0 or step + 1 == num_steps:
            steps, phases = trainer.ledger.close(trainer.clock.take())
            for sums in steps:
                total.add(sums)
            seconds = seconds + phases
            trainer.report(_progress(trainer, epoch, step, steps, phases))
    elapsed = time.perf_counter() - start
    return {
        "type": "epoch",
        "epoch": epoch + 1,
        "seconds": elapsed,
        **{f"train_{key}": value for key, value in total.means().items()},
        "samples_per_second": total.samples / elapsed,
        "minor_faults_per_step": (_minor_faults() - faults) / num_steps,
        "seconds_by_phase": _by_phase(seconds.mean(dim=0)),
        "workers": [_by_phase(row) for row in seconds],
    }


def train_step(trainer: Trainer, order: Tensor, step: int, step_in_epoch: int) -> None:
    """All workers: one optimizer step on one global batch."""
    recipe, plan, clock = trainer.recipe, trainer.plan, trainer.clock
    size = plan.batch_size(step_in_epoch)
    weight = torch.tensor(1 / size)
    row = trainer.ledger.open(step, size)
    for m in range(*trainer.owned):
        samples = plan.micro_batch(order, step_in_epoch, m)
        inputs, targets = trainer.data.splits["train"].gather(samples)
        torch.default_generator.manual_seed(derive_seed(recipe.seed, "step", step, m))
        trainer.flat.reset_buffers()
        clock.lap("data")
        with trainer.exchange.turn(m):
            loss, correct = trainer.objective(inputs, targets)
            clock.lap("forward")
            loss.backward(weight)
        trainer.exchange.collect(m)
        trainer.ledger.note(row, m, loss.item(), int(correct.item()))
        arrived = clock.lap("backward")
    trainer.ledger.arrive(row, arrived)
    gradient, buffers = trainer.exchange.sum()
    trainer.flat.advance_buffers(
        buffers, recipe.micro_batches, min(size, recipe.micro_batches)
    )
    if recipe.optimizer.clip_norm is not None:
        _clip(trainer, gradient, recipe.optimizer.clip_norm)
    clock.lap("exchange")
    trainer.update.step(gradient, trainer.learning_rate(step))
    clock.lap("optimizer")
    trainer.exchange.publish()
    clock.lap("exchange")


def _clip(trainer: Trainer, gradient: Tensor, most: float) -> None:
    """All workers: scales the gradient in place to a global L2 norm of at most `most`.

    The squares are summed by blocks of the flat vector, whoever owns them.
    """
    exchange = trainer.exchange
    cells = torch.zeros(trainer.flat.size // BLOCK, dtype=torch.float64)
    first, end = (cut // BLOCK for cut in exchange.owned)
    if end - first == len(cells):
        cells.copy_(block_norms(gradient))
    else:
        cells[first:end] = block_norms(gradient)
        exchange.merge(cells)
    norm = cells.sum().sqrt().item()
    if norm > most:
        gradient.mul_(most / norm)


def _progress(
    trainer: Trainer, epoch: int, step: int, steps: list[Sums], phases: Tensor
) -> dict[str, Any]:
    total = Sums()
    for sums in steps:
        total.add(sums)
    step += epoch * trainer.plan.steps_per_epoch
    seconds = phases[trainer.rank].sum().item()
    return {
        "type": "step",
        "epoch": epoch + 1,
        "step": step + 1,
        **total.means(),
        "lr": trainer.learning_rate(step),
        "samples_per_second": total.samples / seconds,
        "workers": [_by_phase(row) for row in phases],
    }


def _evaluated(trainer: Trainer, name: str) -> dict[str, float]:
    split = trainer.data.splits[name]
    if len(split) == 0:
        return {}
    sums = evaluate(
        trainer.model,
        split,
        trainer.recipe.evaluation_batch,
        trainer.rank,
        trainer.exchange,
    )
    return {f"{name}_{key}": value for key, value in sums.means().items()}


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _by_phase(seconds: Tensor) -> dict[str, float]:
    return dict(zip(PHASES, seconds.tolist(), strict=True))
