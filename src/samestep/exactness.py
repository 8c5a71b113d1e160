"""What a worker does for `samestep check`: looks for what breaks exactness."""

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from samestep import weights
from samestep.objective import Objective
from samestep.trainer import Trainer
from samestep.training import compare_notes, train_step


def probe(trainer: Trainer, steps: int, send: Callable[[dict[str, Any]], None]) -> None:
    """All workers: one micro-batch twice, then a few steps.

    Sends `probed` from every worker, and `stepped` with a fingerprint for each step.
    """
    send({"type": "probed", **_twice(trainer)})
    for step in range(min(steps, trainer.plan.steps_per_epoch)):
        train_step(trainer, step, step)
        trainer.progress.step += 1
        compare_notes(trainer, 0, step + 1)
        sha256 = weights.agreed(trainer.model, trainer.place.rank, trainer.exchange)
        trainer.report({"type": "stepped", "step": step + 1, "sha256": sha256})


def _twice(trainer: Trainer) -> dict[str, Any]:
    """The same micro-batch two times, by this worker alone."""
    (once, drawn), (again, _) = (_pass(trainer) for _ in range(2))
    names = [name for name in once if once[name] != again[name]]
    return {"sha256": once, "changed": names, "drawn": drawn}


def _pass(trainer: Trainer) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of the samples, the loss and the gradients of one pass.

    And the generators that it drew from although nobody had seeded them.
    """
    before = _other_generators()
    inputs, targets = trainer.feed.draw(0, 0, (0, 1))
    seeded = _other_generators()
    trainer.flat.reset_buffers()
    recipe, function = trainer.recipe, trainer.evaluator.loss
    objective = Objective(
        trainer.model,
        recipe.loss,
        function,
        trainer.data.own_metrics,
        recipe.precision,
    )
    loss, _ = objective(inputs, targets)
    parts = [targets] if isinstance(targets, torch.Tensor) else targets.parts
    gradients = torch.autograd.grad(loss, trainer.flat.parameters, allow_unused=True)
    trainer.flat.reset_buffers()
    after = _other_generators()
    drawn = [g for g in after if before[g] == seeded[g] != after[g]]
    sums = {
        "the samples": _sha256(inputs, *parts),
        "the loss": _sha256(loss),
        "the gradients": _sha256(*(g for g in gradients if g is not None)),
    }
    return sums, drawn


def _other_generators() -> dict[str, str]:
    """The states of the generators that are not seeded for a micro-batch."""
    numbers = np.random.get_state(legacy=False)
    words, place = numbers["state"]["key"], numbers["state"]["pos"]
    return {
        "`random`": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "`numpy.random`": hashlib.sha256(
            words.tobytes() + bytes(str(place), "ascii")
        ).hexdigest(),
    }


def _sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()
