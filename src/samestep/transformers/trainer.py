"""A Trainer for Transformers: the same weights at any number of processes.

    trainer = SamestepTrainer(model, args, train_dataset=..., micro_batches=8)

`per_device_train_batch_size` is the global batch. Transformers sees one process and one
batch for each pass, the same everywhere; the loss is computed for each micro-batch of
it that belongs to the process.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from samestep.core.plan import derive_seed
from samestep.data.batches import GlobalBatch
from samestep.errors import OwnCodeError
from samestep.loop.balancing import Balance
from samestep.loop.connection import Choice
from samestep.loop.loop import Loop
from samestep.loop.position import Position
from samestep.transformers import checkpoints, resuming
from samestep.transformers.accumulation import Accumulation
from samestep.transformers.evaluation import Evaluation
from samestep.transformers.requirements import check, see_one_process
from samestep.transformers.steps import Steps


class SamestepTrainer(Trainer):  # type: ignore[misc]
    """Exact data-parallel training on CPUs. `torchrun` starts the processes."""

    prediction_step: Any

    def __init__(
        self,
        *arguments: Any,
        micro_batches: int,
        threads: int = 1,
        exchange: Choice = "auto",
        balance: Balance = "auto",
        **options: Any,
    ) -> None:
        """All processes: join the others, each with a model of the same weights.

        `arguments` and `options` are those of a Trainer. Each batch is cut into
        `micro_batches` pieces: part of the recipe, like the seeds in the
        TrainingArguments and the number of torch's `threads`. `exchange` and `balance`
        as for a Loop. Raises PlacementError, OwnCodeError.
        """
        super().__init__(*arguments, **options)
        self._micro_batches, self._threads = micro_batches, threads
        self._exchange, self._balance = exchange, balance
        self._accumulation = Accumulation()
        names = "per_device_train_batch_size", "gradient_accumulation_steps"
        self._position = Position(
            micro_batches=micro_batches,
            seed=self._seed,
            **{name: getattr(self.args, name) for name in names},
        )
        self._logged: dict[str, Any] | None = None
        self.last_step: dict[str, Any] = {"grad_norm": None, "learning_rate": None}
        self._join()
        self.add_callback(_EpochEnd(self._position))

    def create_accelerator_and_postprocess(self) -> None:
        """Make an accelerator that leaves loaders as they are."""
        check(self.args)
        see_one_process(self.args)
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_data_loader = lambda loader, *_, **__: loader

    @property
    def _seed(self) -> int:
        """That of order and dropout."""
        seed, data_seed = int(self.args.seed), self.args.data_seed
        return seed if data_seed is None else derive_seed(seed, "data", data_seed)

    def _join(self) -> None:
        """All processes: make a loop for the model."""
        self._joined = self.model
        self.loop = Loop(
            self.model,
            self._micro_batches,
            seed=self._seed,
            threads=self._threads,
            exchange=self._exchange,
            balance=self._balance,
            timeout_seconds=self.args.ddp_timeout,
        )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *given: Any,
        **named: Any,
    ) -> Any:
        """All processes: train, as Transformers does, from a complete checkpoint.

        True stands for the last one that is complete. Raises OwnCodeError.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoints.chosen(
                resume_from_checkpoint, self.args.output_dir
            )
        return super().train(resume_from_checkpoint, *given, **named)

    def _init_training_state(self, *given: Any) -> tuple[int, int]:
        """Return how many epochs, and batches of the next one, are over."""
        trained = super()._init_training_state(*given)
        checkpoint = given[3]
        self._logged = checkpoint and resuming.load(checkpoint, self._position)
        if self._logged is None or self.args.ignore_data_skip:
            self._position.reach(*trained)
        return self._position.epoch, self._position.step

    def _run_epoch(self, **given: Any) -> None:
        """All processes: train for an epoch, or for what is left of one."""
        if self.model is not self._joined:  # but made by `model_init`
            self._join()
        if self._logged is not None:
            resuming.go_on_logging(self, self._logged)
            self._load_rng_state(given["resume_from_checkpoint"])
            self._logged = None
        steps = Steps(self.loop, given["train_dataloader"], self._position)
        super()._run_epoch(**given | {"train_dataloader": steps.loader()})

    def _maybe_log_save_evaluate(
        self, loss: Tensor, grad_norm: Any, *given: Any, **named: Any
    ) -> None:
        """Note the last step: a training that goes on may log it at an epoch's end."""
        if named.get("learning_rate") is not None:
            norm = None if grad_norm is None else float(grad_norm)
            self.last_step = {"grad_norm": norm} | named
        norm, rate = self.last_step.values()
        super()._maybe_log_save_evaluate(loss, norm, *given, learning_rate=rate)

    def training_step(
        self, model: nn.Module, inputs: GlobalBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """All processes: compute a global batch, and return its loss.

        If gradients are accumulated, the loss is that of all batches since the last
        step of the optimizer, returned with the last of them; zero until then.
        """
        self.optimizer.train()  # may change the weights
        self.current_gradient_accumulation_steps = 1  # since Accumulation divides
        for piece in self.loop.step(inputs):
            self._pass(model, piece)
        totals = self.loop.totals()
        self.current_flos += totals["operations"][0]
        self.state.num_input_tokens_seen += int(totals["tokens"][0])
        total, count = totals["loss"]
        mean = total / count if count else float("nan")
        weight, _ = totals.get("items", (1.0, 0.0))
        trained = [p for p in model.parameters() if p.requires_grad]
        is_last = self.accelerator.sync_gradients
        return torch.tensor(self._accumulation.add(trained, mean, weight, is_last))

    def _pass(self, model: nn.Module, inputs: Any) -> None:
        """Compute a micro-batch. Its loss is the mean over its targets."""
        items = self._get_num_items_in_batch([inputs], self.args.device)
        targets = self.count_targets(inputs)
        count = float(self.loop.samples) if targets is None else targets
        if targets is not None:
            # Before the backward pass, during which gradients may be sent.
            self.loop.weigh(targets)
        loss = float(super().training_step(model, inputs, items))
        if items is not None:
            self.loop.add(items=(count, 0.0))
        self.loop.add(
            loss=(loss * count if count else 0.0, count),
            operations=(float(self.floating_point_ops(inputs)), 0.0),
            tokens=(float(self._count_tokens(inputs)), 0.0),
        )

    def count_targets(self, inputs: Any) -> float | None:
        """Return how many targets the loss of a micro-batch is the mean over.

        They are what Transformers counts as `num_items_in_batch`, otherwise the labels
        other than -100, or None: the samples. Override it for a loss with another
        denominator, such as the sum of the weights of classes.
        """
        items = self._get_num_items_in_batch([inputs], self.args.device)
        if items is None and isinstance(labels := inputs.get("labels"), Tensor):
            items = labels.ne(-100).sum()
        return None if items is None else float(items)

    def _count_tokens(self, inputs: Any) -> int:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        after, self.state.num_input_tokens_seen = (
            self.state.num_input_tokens_seen,
            before,
        )
        return int(after - before)

    def _track_num_input_tokens(self, inputs: GlobalBatch) -> None:
        """Do nothing: `training_step` has counted them."""

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """All processes: predict all batches, and return what one process would."""
        args, step = self.args, self.prediction_step
        if prediction_loss_only is None:
            prediction_loss_only = args.prediction_loss_only

        def predict(inputs: Any) -> Any:
            result = step(self.model, inputs, prediction_loss_only, ignore_keys)
            return (inputs if "inputs" in args.include_for_metrics else {}), result

        place = self.loop.rank, self.loop.workers
        evaluation = Evaluation(dataloader, place, self._seed, predict)
        given = description, prediction_loss_only, ignore_keys, metric_key_prefix
        self.prediction_step = lambda _, predicted, *__, **___: predicted.result
        try:
            return super().evaluation_loop(evaluation, *given)
        finally:
            del self.prediction_step

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the generators, the same everywhere, and where the training is."""
        if self.args.should_save:
            super()._save_rng_state(output_dir)
            resuming.save(output_dir, self._position, self)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """All processes: save, and go on when it is there for all.

        It may be written over the one that the training goes on from, which a slower
        process may still be reading.
        """
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.begin(self._get_output_dir(trial), self.state.global_step)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()

    def save_model(self, *given: Any, **named: Any) -> None:
        """All processes: save, and go on when it is there for all."""
        super().save_model(*given, **named)
        self.accelerator.wait_for_everyone()

    def hyperparameter_search(self, *given: Any, **named: Any) -> Any:
        """Search in one process. Raises OwnCodeError in several."""
        if self.loop.workers > 1:
            raise OwnCodeError(
                "A search draws trials in each process, and these would be others. "
                "Start one process, or search with a script that starts trainings."
            )
        return super().hyperparameter_search(*given, **named)


class _EpochEnd(TrainerCallback):  # type: ignore[misc]
    """Notes that an epoch is over: what is saved now goes on with the next."""

    def __init__(self, position: Position) -> None:
        self._position = position

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._position.reach(self._position.epoch + 1, 0)
