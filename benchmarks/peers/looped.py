"""`samestep.Loop` under torchrun: ddp.py, exact at any number of workers."""

import torch
from common import run, task
from torch.utils.data import TensorDataset

import samestep


def main() -> None:
    work = task()
    model, criterion = work.model(), work.criterion()
    optimizer = work.optimizer(model)
    train, batch = TensorDataset(*work.train), work.recipe.global_batch
    loop = samestep.Loop(model, work.recipe.micro_batches, threads=work.threads)

    def epoch(index: int) -> None:
        total = torch.zeros(())
        for i, step in enumerate(loop.steps(train, batch, index)):
            rate = work.learning_rate(index * work.steps_per_epoch + i)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            for x, y in step:
                loss = criterion(model(x), y)
                loss.backward()
                total += loss.detach()
            work.clip(model)
            optimizer.step()

    run(work, model, epoch, reports=loop.rank == 0)


main()
