"""A strategy for Lightning's Trainer: the same weights at any number of processes.

    trainer = L.Trainer(devices=2, strategy=SamestepStrategy(micro_batches=8), ...)

The `batch_size` of a DataLoader is the global batch. Lightning sees one batch for each
step, the same in every process; `training_step` is called for each micro-batch of it
that belongs to the process.
"""

import os
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from samestep.data.batches import GlobalBatch
from samestep.errors import OwnCodeError
from samestep.lightning.loader import GlobalBatches, content, finish, is_global
from samestep.lightning.logged import LOSS, Logged
from samestep.lightning.manual import Manual
from samestep.lightning.metrics import Metrics
from samestep.lightning.midway import Midway
from samestep.lightning.stepping import together
from samestep.lightning.termination import Termination
from samestep.loop.connection import Choice
from samestep.loop.loop import Loop


class SamestepStrategy(DDPStrategy):  # type: ignore[misc]
    """Exact data-parallel training on CPUs. Processes are started as for DDP."""

    def __init__(
        self,
        micro_batches: int,
        seed: int | None = None,
        timeout: timedelta = timedelta(minutes=10),
        exchange: Choice = "auto",
        **launch: Any,
    ) -> None:
        """Cut every global batch into `micro_batches` pieces: part of the recipe.

        The `seed` of order and dropout is that of `seed_everything` by default, or 0.
        The `exchange` is as for a `samestep.Loop`.
        `launch` as for a DDPStrategy: `start_method`, `cluster_environment`.
        """
        super().__init__(process_group_backend="gloo", timeout=timeout, **launch)
        self._micro_batches, self._wait = micro_batches, timeout
        self._seed, self._exchange = seed, exchange
        self._midway = Midway()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Load weights after their type is set: before, float64 would be rounded."""
        return True

    def setup(self, trainer: Any) -> None:
        """All processes: set up as DDP does, and join the loop."""
        # Otherwise Lightning divides the samples among the processes, and pads them.
        trainer._accelerator_connector.use_distributed_sampler = False
        super().setup(trainer)
        _check(trainer)
        given = os.environ.get("PL_GLOBAL_SEED", "0")
        self.loop = Loop(
            self.lightning_module,
            self._micro_batches,
            seed=int(given) if self._seed is None else self._seed,
            exchange=self._exchange,
            balance="off",
            timeout_seconds=self._wait.total_seconds(),
        )
        counts, module = (self.loop, self._micro_batches), self.lightning_module
        self._manual = Manual(*counts, module, self._after_backward)
        self._termination = Termination(trainer, self.loop)
        self._logged = Logged(
            *counts, self._termination, is_within=lambda: self._manual.is_running
        )

    def configure_ddp(self) -> None:
        """Leave the module as it is: the loop sums gradients."""

    def process_dataloader(self, dataloader: Any) -> Any:
        """Return a loader of global batches. In `predict` each process has all."""
        trainer = self.lightning_module.trainer
        if trainer.predicting:
            return dataloader
        if not isinstance(dataloader, DataLoader):
            raise OwnCodeError(
                "Global batches are cut from the samples of a DataLoader; received "
                f"{type(dataloader).__name__}."
            )
        is_training = trainer.training
        return GlobalBatches(
            self.loop,
            dataloader,
            lambda: trainer.current_epoch if is_training else None,
        )

    def batch_to_device(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        """Leave a global batch as it is; its micro-batches go to the device later."""
        if is_global(batch):
            return batch
        return super().batch_to_device(batch, *arguments, **options)

    def training_step(self, batch: Any, *arguments: Any) -> Tensor | None:
        """All processes: compute a global batch, and return its loss, if it has one."""
        module, whole = self.lightning_module, content(batch, self._micro_batches)
        is_automatic = module.automatic_optimization
        compute = self._step if is_automatic else self._step_manually
        self._midway.begin(module)
        with self._logged.taking(module) as metrics:
            compute(whole, metrics, super().training_step, *arguments)
        finish(batch)
        loss = self._logged.pass_on(module, metrics, whole.size)
        self._midway.go_on(module, metrics)
        return None if loss is None else torch.tensor(loss, requires_grad=is_automatic)

    def _step(
        self, whole: GlobalBatch, metrics: Metrics, step: Any, *arguments: Any
    ) -> None:
        module = self.lightning_module
        trained = [p for p in module.parameters() if p.requires_grad]
        accumulated = [parameter.grad for parameter in trained]
        for piece in self.loop.step(whole):
            with metrics.of_micro_batch():
                loss = _loss(step(self._ready(piece), *arguments))
            module.backward(loss)
            self._add_loss(loss)
        self._summed = [(parameter, parameter.grad) for parameter in trained]
        # Lightning now clears the gradients of the last step, then calls `backward`.
        for parameter, before in zip(trained, accumulated, strict=True):
            parameter.grad = before

    def _step_manually(
        self, whole: GlobalBatch, metrics: Metrics, step: Any, *arguments: Any
    ) -> None:
        def compute(piece: Any) -> None:
            output = step(self._ready(piece), *arguments)
            if isinstance(output, dict):
                output = output.get("loss")
            if output is not None:
                self._add_loss(_loss(output))

        with together(self._manual, self.lightning_module.trainer):
            self._manual.step(whole, compute, metrics)

    def _add_loss(self, loss: Tensor) -> None:
        samples = self.loop.samples
        if samples:
            self.loop.add(**{LOSS: (float(loss.detach()) * samples, samples)})

    def backward(
        self, closure_loss: Tensor, optimizer: Any, *arguments: Any, **options: Any
    ) -> Tensor:
        """Add the gradient of the global batch to what is accumulated.

        In manual optimization, compute that of a micro-batch before.
        """
        module, precision = self.lightning_module, self.precision_plugin
        precision.pre_backward(closure_loss, module)
        if self._manual.is_running:
            given = (closure_loss, module, optimizer, *arguments)
            self._manual.backward(partial(precision.backward, *given, **options))
            return closure_loss.detach()
        batches = module.trainer.accumulate_grad_batches
        for parameter, gradient in self._summed:
            share = gradient / batches if batches > 1 else gradient
            before = parameter.grad
            parameter.grad = share if before is None else before + share
        precision.post_backward(closure_loss, module)
        return closure_loss

    def _after_backward(self) -> None:
        """Call the hooks once, with the gradients of the global batch."""
        self.precision_plugin.post_backward(torch.tensor(0.0), self.lightning_module)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], *arguments: Any, **options: Any
    ) -> None:
        """Save what Lightning saves, and what it forgets of the epoch."""
        self._midway.save(self.lightning_module, checkpoint)
        super().save_checkpoint(checkpoint, *arguments, **options)

    def load_checkpoint(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load what was saved."""
        checkpoint: dict[str, Any] = super().load_checkpoint(*arguments, **options)
        if self.lightning_module.trainer.training:
            self._midway.load(checkpoint)
        return checkpoint

    def validation_step(self, batch: Any, *arguments: Any) -> None:
        """All processes: measure a global batch."""
        self._measure(super().validation_step, batch, *arguments)

    def test_step(self, batch: Any, *arguments: Any) -> None:
        """All processes: measure a global batch."""
        self._measure(super().test_step, batch, *arguments)

    def _measure(self, step: Any, batch: Any, *arguments: Any) -> None:
        module, whole = self.lightning_module, content(batch, self._micro_batches)
        with self._logged.taking(module) as metrics:
            for piece in self.loop.measure(whole):
                with metrics.of_micro_batch():
                    step(self._ready(piece), *arguments)
        self._logged.pass_on(module, metrics, whole.size)

    def _ready(self, piece: Any) -> Any:
        """Return a micro-batch as Lightning hands it to a module."""
        self._termination.tell()
        return super().batch_to_device(self.precision_plugin.convert_input(piece))


def _check(trainer: Any) -> None:
    """Raise OwnCodeError for what cannot be exact."""
    module = trainer.lightning_module
    if is_overridden("on_before_batch_transfer", module):
        raise OwnCodeError(
            "`on_before_batch_transfer` gets whole batches, of which each process has "
            "a part. Use `on_after_batch_transfer`, which gets micro-batches."
        )


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise OwnCodeError(
            "`training_step` returns the mean loss of its samples, or a dictionary "
            f"with it as `loss`; received {type(loss).__name__}."
        )
    return loss
