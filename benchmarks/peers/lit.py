"""PyTorch Lightning, strategy `ddp` with two CPU devices.

Batches are gathered from memory by one indexing operation each.
"""

import time
from collections.abc import Iterator

import lightning
import torch
from common import Task, task, tell
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset


class Batches(Sampler[list[int]]):
    """This rank's part of every global batch."""

    def __init__(self, work: Task, rank: int, workers: int) -> None:
        self.work, self.rank, self.workers, self.epoch = work, rank, workers, 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.work.train[1]), generator=generator)
        for samples in torch.split(order, self.work.recipe.global_batch):
            yield samples.chunk(self.workers)[self.rank]

    def __len__(self) -> int:
        return self.work.steps_per_epoch


class Module(lightning.LightningModule):
    def __init__(self, work: Task) -> None:
        super().__init__()
        self.work, self.model, self.criterion = work, work.model(), work.criterion()
        self.seconds: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self.criterion(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.work.optimizer(self)
        base = self.work.recipe.optimizer.lr
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.work.learning_rate(step) / base
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        batches = Batches(self.work, self.global_rank, self.trainer.world_size)
        dataset = TensorDataset(*self.work.train)
        return DataLoader(dataset, sampler=batches, batch_size=None)

    def on_train_epoch_start(self) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    work = task()
    module = Module(work)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=work.epochs,
        logger=False,
        enable_checkpointing=False,
        gradient_clip_val=work.recipe.optimizer.max_grad_norm,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    if trainer.is_global_zero:
        tell(work, module.model, module.seconds)


main()
