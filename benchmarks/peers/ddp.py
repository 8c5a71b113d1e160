"""PyTorch DDP over Gloo as its tutorial has it, started by torchrun.

Each rank takes its slice of every global batch; DDP averages the gradients.
"""

import torch
import torch.distributed as dist
from common import run, task
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    work = task()
    model, criterion = work.model(), work.criterion()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = work.optimizer(model)
    inputs, targets = work.train
    batch = work.recipe.global_batch

    def epoch(index: int) -> None:
        order = torch.randperm(
            len(targets), generator=torch.Generator().manual_seed(index)
        )
        total = torch.zeros(())
        for i, samples in enumerate(torch.split(order, batch)):
            own = samples.chunk(workers)[rank]
            rate = work.learning_rate(index * work.steps_per_epoch + i)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss = criterion(ddp(inputs[own]), targets[own])
            loss.backward()
            work.clip(model)
            optimizer.step()
            total += loss.detach()

    run(work, model, epoch, reports=rank == 0)
    dist.destroy_process_group()


main()
