"""What a Trainer may ask for, and what cannot be exact."""

import os
from typing import Any

import torch.distributed as dist
from accelerate.utils import DistributedType

from samestep.errors import OwnCodeError
from samestep.loop.process_group import place


REFUSED = {
    "fp16": "`fp16` is for GPUs, and skips steps whose gradients overflow. Use `bf16`.",
    "fsdp": "FSDP divides the weights among the processes; here each has all of them.",
    "deepspeed": "DeepSpeed has its own loop and its own sums of gradients.",
    "parallelism_config": "A model is whole in each process; leave out "
    "`parallelism_config`.",
    "torch_compile": "A compiler makes other kernels for other shapes and at other "
    "times; leave out `torch_compile`.",
    "auto_find_batch_size": "The batch belongs to the recipe, and must not depend on "
    "the memory of a machine; leave out `auto_find_batch_size`.",
    "enable_jit_checkpoint": "Each process gets a signal after another step, and all "
    "must save after the same; leave out `enable_jit_checkpoint`.",
}
STEP_IN_BACKWARD = ("layerwise", "lomo")
"""Parts of the names of optimizers that change weights before all gradients are there.
"""


def check(args: Any) -> None:
    """Raise OwnCodeError for what cannot be exact."""
    for name, reason in REFUSED.items():
        if getattr(args, name, None):
            raise OwnCodeError(reason)
    if args.device.type != "cpu":
        raise OwnCodeError(
            f"The gradients are summed on CPUs, and the device is `{args.device}`. Set "
            "`use_cpu=True`."
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise OwnCodeError(
            "`batch_rebalance` makes other batches for another number of processes. "
            "Use `group_by_length`."
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(part in optimizer for part in STEP_IN_BACKWARD):
        raise OwnCodeError(
            f"`{optimizer}` changes weights in a backward pass, before the gradients "
            "of the global batch are summed. Use one that makes its step afterwards."
        )


def see_one_process(args: Any) -> None:
    """Let Transformers and Accelerate take this process for the only one.

    They keep its rank, so that one process saves, logs and shows a bar, and still wait
    for all where they are told to. Otherwise they would wrap the model, divide samples
    and average what is the same everywhere.
    """
    state = args.distributed_state
    state.process_index = place()[0]
    state.local_process_index = int(os.environ.get("LOCAL_RANK", state.process_index))
    state.num_processes, state.distributed_type = 1, DistributedType.NO
    if place()[1] > 1:
        state.wait_for_everyone = dist.barrier
