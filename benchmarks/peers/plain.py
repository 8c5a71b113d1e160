"""A plain loop: one process, tensors in memory."""

import torch
from common import run, task


def main() -> None:
    work = task()
    model, criterion = work.model(), work.criterion()
    optimizer = work.optimizer(model)
    inputs, targets = work.train
    batch = work.recipe.global_batch

    def epoch(index: int) -> None:
        order = torch.randperm(len(targets))
        total = torch.zeros(())
        for i, samples in enumerate(torch.split(order, batch)):
            rate = work.learning_rate(index * work.steps_per_epoch + i)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss = criterion(model(inputs[samples]), targets[samples])
            loss.backward()
            work.clip(model)
            optimizer.step()
            total += loss.detach()

    run(work, model, epoch)


main()
