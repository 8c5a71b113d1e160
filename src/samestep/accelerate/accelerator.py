"""An Accelerator whose training is the same at any number of processes.

    accelerator = Accelerator(micro_batches=8)

The `batch_size` of a loader is the global batch. A script iterates over the
micro-batches of its process, as if they were accumulated: with `sync_gradients` at the
last of them, when the gradients of all processes are summed.
"""

from collections.abc import Iterator
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from samestep.accelerate.gathering import Gathering
from samestep.accelerate.loader import PreparedLoader, Progress, rounds
from samestep.accelerate.training import Training
from samestep.errors import OwnCodeError
from samestep.loop.loop import Loop
from samestep.loop.process_group import join, place
from samestep.user_code import seeding


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """Exact data-parallel training on CPUs. Processes are started as for Accelerate."""

    def __init__(
        self,
        *,
        micro_batches: int,
        seed: int | None = None,
        timeout_seconds: float = 600.0,
        **options: Any,
    ) -> None:
        """Cut every global batch into `micro_batches` pieces: part of the recipe.

        The `seed` of order and dropout is that of `set_seed` by default. `options` are
        those of Accelerate; `cpu` is always on. Raises OwnCodeError.
        """
        workers = place()[1]
        join(workers, timeout_seconds)
        super().__init__(**{**options, "cpu": True})
        _check(self, workers)
        self._micro_batches, self._seed = micro_batches, seed
        self._timeout_seconds = timeout_seconds
        self._training: Training | None = None
        self._gathering: Gathering | None = None
        # Otherwise schedules would count the iterations of this process.
        self.gradient_state.plugin_kwargs["adjust_scheduler"] = False
        self.register_for_checkpointing(_Saved(self))

    @property
    def split_batches(self) -> bool:
        """Always: the batch of a loader is that of all processes."""
        return True

    @property
    def num_processes(self) -> int:
        """Return 1: scripts multiply batch sizes, schedules and learning rates by it.

        How many there are is `accelerator.state.num_processes`.
        """
        return 1

    def prepare_model(self, model: nn.Module, *arguments: Any, **options: Any) -> Any:
        """All processes: prepare a model; if it is trained, join the loop."""
        # For an evaluation a model is not wrapped by DDP: here the loop sums gradients.
        options["evaluation_mode"] = True
        prepared = super().prepare_model(model, *arguments[:1], **options)
        if any(parameter.requires_grad for parameter in model.parameters()):
            self._train(model)
        return prepared

    def _train(self, model: nn.Module) -> None:
        """All processes: join the loop with the model to be trained."""
        if self._training is None:
            count, seed = self._micro_batches, self._common_seed()
            wait = self._timeout_seconds
            loop = Loop(model, count, seed=seed, balance="off", timeout_seconds=wait)
            self._training = Training(model, loop, count)
        elif self._training.model is not model:
            raise OwnCodeError(
                "An Accelerator trains one model, since all micro-batches of a step "
                "are computed with the same weights. Networks that take turns, as in a "
                "GAN, have a `samestep.Loop` each."
            )

    def _common_seed(self) -> int:
        """All processes: return the seed. Raises OwnCodeError if there are several."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        if len(set(gather_object([self._seed]))) > 1:
            raise OwnCodeError(
                "All processes draw the order of the samples from one seed, and these "
                "have several. Call `set_seed` with the same number in each (without "
                "`device_specific`), or `Accelerator(seed=...)`."
            )
        return self._seed

    def prepare_optimizer(self, optimizer: Optimizer, **options: Any) -> Any:
        """Prepare an optimizer: it makes a step at the end of a global batch."""
        prepared = super().prepare_optimizer(optimizer, **options)
        if prepared is not optimizer:
            optimizer.register_step_post_hook(self._note_step)
        return prepared

    def _note_step(self, *_: Any) -> None:
        if self._training:
            self._training.note_step()

    def prepare_data_loader(self, data_loader: Any, *_: Any, **__: Any) -> Any:
        """All processes: make it yield micro-batches, in an evaluation batches."""
        if not isinstance(data_loader, PreparedLoader):
            recipe = {"micro_batches": self._micro_batches, "seed": self._common_seed()}
            data_loader = PreparedLoader(self, data_loader, Progress(**recipe))
        if data_loader not in self._dataloaders:
            self._dataloaders.append(data_loader)
        return data_loader

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """Return a loader that begins this epoch after `num_batches` global batches."""
        return dataloader.without_first(num_batches)

    def iterate(self, loader: PreparedLoader) -> Iterator[Any]:
        """All processes: begin to train, if the model is in that mode, or evaluate."""
        self._meet("A loop over a loader")
        if self._training and self._training.is_on:
            return self._training.epoch(loader)
        return self._evaluate(loader.base_dataloader)

    def _evaluate(self, loader: DataLoader[Any]) -> Iterator[Any]:
        before, seed = self._gathering, self._common_seed()
        place = self.state.process_index, self.state.num_processes
        try:
            with seeding.kept():
                for samples, batch in rounds(loader, seed, *place):
                    self._gathering = Gathering()
                    self._gathering.begin(samples, is_last=True)
                    yield batch
        finally:
            self._gathering = before

    def _do_sync(self) -> None:
        """Leave `sync_gradients` as the loader has set it for this iteration."""

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """All processes: compute gradients; in the last own iteration, sum them all.

        The loss is a mean over the samples of the micro-batch. Raises OwnCodeError.
        """
        if self._training is None:
            raise OwnCodeError("Give the model to `prepare` before `backward`.")
        self._training.backward(loss, **kwargs)

    def weigh(self, count: float | torch.Tensor) -> None:
        """Set how many targets the current loss is the mean of; before `backward`.

        See `samestep.Loop.weigh`. Raises OwnCodeError.
        """
        if self._training is None:
            raise OwnCodeError("Give the model to `prepare` before `weigh`.")
        self._training.weigh(float(count))

    def gather_for_metrics(
        self, input_data: Any, use_gather_object: bool = False
    ) -> Any:
        """All processes: return the rows of all samples, in their order.

        In a training, at the last iteration of a global batch; in others no rows.
        """
        gathering = self._gathering or (self._training and self._training.gathering)
        if not gathering:
            raise OwnCodeError(
                "`gather_for_metrics` puts rows in the order of the samples: call it "
                "in the loop over a loader from `prepare`."
            )
        return gathering(input_data)

    def gather(self, tensor: Any) -> Any:
        """All processes: as `gather_for_metrics`, in an evaluation only."""
        if not self._gathering:
            raise OwnCodeError(
                "`gather` depends on the number of processes. Use "
                "`gather_for_metrics`, in the loop over a loader; in a training it "
                "returns all rows of a global batch at its last iteration."
            )
        return self._gathering(tensor)

    def reduce(self, *_: Any, **__: Any) -> Any:
        """Refuse to add what each process has summed up; see `gather_for_metrics`."""
        raise OwnCodeError(
            "`reduce` adds what each process has summed up, in an order and with "
            "repeated batches that depend on their number. Sum up what "
            "`gather_for_metrics` returns."
        )

    def set_trigger(self) -> None:
        """Refuse to decide by what one process has seen; see `gather_for_metrics`."""
        self.check_trigger()

    def check_trigger(self) -> Any:
        """Refuse to decide by what one process has seen; see `gather_for_metrics`."""
        raise OwnCodeError(
            "A trigger is set by what one process has seen, which depends on their "
            "number. Decide by what `gather_for_metrics` returns: it is the same in "
            "all processes, so each can `break` by itself."
        )

    def pad_across_processes(self, *arguments: Any, **options: Any) -> Any:
        """All processes: pad to one size."""
        self._meet("`pad_across_processes`")
        return super().pad_across_processes(*arguments, **options)

    def wait_for_everyone(self) -> None:
        """All processes: wait for the others."""
        self._meet("`wait_for_everyone`")
        super().wait_for_everyone()

    def save_state(self, *arguments: Any, **options: Any) -> Any:
        """All processes, after a step of the optimizer: save what `load_state` loads.

        Raises OwnCodeError elsewhere, ReplicasDiffer if a script has changed weights.
        """
        self._meet("`save_state`")
        if self._training:
            self._training.loop.fingerprint()
        return super().save_state(*arguments, **options)

    def get_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Return the weights, after a step of the optimizer."""
        self._meet("Saving the model")
        return super().get_state_dict(*arguments, **options)

    def end_training(self) -> None:
        """All processes: finish the trackers, and leave."""
        self._meet("The end of a training")
        super().end_training()

    def free_memory(self, *objects: Any) -> Any:
        """Forget the model, the optimizer and the loaders."""
        self._training = None
        return super().free_memory(*objects)

    def _meet(self, what: str) -> None:
        if self._training:
            self._training.check_between_steps(what)


class _Saved:
    """What is saved with a state besides weights, optimizer and schedule."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, Any]:
        """Return how far the training with each loader is, and the generators."""
        loaders = self._accelerator._dataloaders
        return {"loaders": [loader.progress.state_dict() for loader in loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises OwnCodeError."""
        loaders = self._accelerator._dataloaders
        for loader, progress in zip(loaders, state["loaders"], strict=True):
            loader.progress.load_state_dict(progress)


def _check(accelerator: Accelerator, workers: int) -> None:
    """Raise OwnCodeError for what cannot be exact."""
    kind, config = accelerator.distributed_type, accelerator.dataloader_config
    found = accelerator.state.num_processes, accelerator.device.type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU) or found != (
        workers,
        "cpu",
    ):
        raise OwnCodeError(
            f"Each of {workers} processes has the whole model, on a CPU; Accelerate is "
            f"set up for {found[0]} with {kind} on `{accelerator.device}`. Make the "
            "Accelerator before any other state of Accelerate, and without a plugin "
            "that distributes the model."
        )
    if config.use_stateful_dataloader:
        raise OwnCodeError(
            "A state says itself how many global batches were taken, at any number of "
            "processes. Leave out `use_stateful_dataloader`, and go on with "
            "`skip_first_batches`."
        )
