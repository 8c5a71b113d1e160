"""What a worker does for `samestep check`: looks for what breaks exactness."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from samestep import dtypes, weights
from samestep.nested import leaves
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
    once, again = (_pass(trainer) for _ in range(2))
    names = [name for name in once if once[name] != again[name]]
    return {"sha256": once, "changed": names}


def _pass(trainer: Trainer) -> dict[str, str]:
    """SHA-256 of the samples, the loss and the gradients of one pass."""
    inputs, targets = trainer.feed.draw(0, 0, (0, 1))
    trainer.flat.reset_buffers()
    recipe, function = trainer.recipe, trainer.evaluator.loss
    objective = Objective(
        trainer.model,
        recipe.loss,
        function,
        trainer.data.own_metrics,
        recipe.precision,
    )
    parts = [targets] if isinstance(targets, torch.Tensor) else targets.parts
    with dtypes.default(trainer.flat.dtype):
        loss, _ = objective(inputs, targets)
        gradients = torch.autograd.grad(
            loss, trainer.flat.parameters, allow_unused=True
        )
    trainer.flat.reset_buffers()
    return {
        "the samples": _sha256(*(t for _, t in leaves(inputs)), *parts),
        "the loss": _sha256(loss),
        "the gradients": _sha256(*(g for g in gradients if g is not None)),
    }


def _sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()
