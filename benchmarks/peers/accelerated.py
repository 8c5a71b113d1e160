"""Hugging Face Accelerate on CPU, two processes started by torchrun."""

import torch
from accelerate import Accelerator
from common import run, task


def main() -> None:
    accelerator = Accelerator(cpu=True)
    rank, workers = accelerator.process_index, accelerator.num_processes
    work = task()
    model, criterion = work.model(), work.criterion()
    prepared, optimizer = accelerator.prepare(model, work.optimizer(model))
    inputs, targets = work.train

    def epoch(index: int) -> None:
        order = torch.randperm(
            len(targets), generator=torch.Generator().manual_seed(index)
        )
        total = torch.zeros(())
        for i, samples in enumerate(torch.split(order, work.recipe.global_batch)):
            own = samples.chunk(workers)[rank]
            rate = work.learning_rate(index * work.steps_per_epoch + i)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss = criterion(prepared(inputs[own]), targets[own])
            accelerator.backward(loss)
            work.clip(model)
            optimizer.step()
            total += loss.detach()

    run(work, model, epoch, reports=accelerator.is_main_process)
    accelerator.end_training()


main()
