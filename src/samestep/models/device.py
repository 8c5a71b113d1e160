"""The device that a worker computes on: the CPU, or a GPU.

GPU support is experimental: it has never run on a GPU (docs/gpu.md). The contract
stays, since what is exact on the CPU is so by construction: a micro-batch is computed
alone, with random numbers that are seeded for it, and sums follow the canonical tree
(NCCL and Gloo only move the partials, they add nothing). Besides, a GPU needs kernels
that give the same bits each time. `Device.prepare` asks torch for these; an operation
that has none raises an error.

Samples, initial weights, metrics and snapshots are drawn, counted and written on the
CPU. No process that forks workers may initialise CUDA: its children could not use it.
"""

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from samestep.data import pytree
from samestep.data.augment import Mixed
from samestep.data.pytree import Nested
from samestep.errors import PlacementError
from samestep.system import conditions
from samestep.system.machine import Gpus


@dataclass(frozen=True)
class Device:
    """The device of one worker."""

    target: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def prepare(cls, kind: str, local_rank: int, is_shared: bool = False) -> "Device":
        """Return a worker's device, `cpu` or `cuda`, made ready for exact results.

        Workers take the GPUs in turn if one may be shared. Call it before anything is
        computed. Raises PlacementError.
        """
        if kind == "cpu":
            return cls()
        count = torch.cuda.device_count()
        if local_rank >= count and not (is_shared and count):
            raise PlacementError(
                f"Worker {local_rank} needs a GPU of its own, and this machine shows "
                f"{count}. Use fewer `--workers` or `--exchange gloo`, or look at "
                "CUDA_VISIBLE_DEVICES."
            )
        index = local_rank % count
        # cuBLAS reads it when it starts: one buffer for each stream, always the same.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False  # it picks kernels by their speed
        # float32 means float32: TF32 keeps 10 bits of the mantissa.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.cuda.set_device(index)
        return cls(torch.device("cuda", index))

    @property
    def is_gpu(self) -> bool:
        """Whether work is queued here and done later."""
        return self.target.type == "cuda"

    def seed(self, seed: int) -> None:
        """Seed the generator of a GPU; that of the CPU is seeded with the samples."""
        if self.is_gpu:
            torch.cuda.manual_seed(seed)

    def finish(self) -> None:
        """Wait until everything that was queued is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.target)

    def move(self, model: nn.Module) -> nn.Module:
        """Move a module's parameters and buffers here; return the same module."""
        return model if self.target.type == "cpu" else model.to(self.target)

    def to_device(
        self, inputs: Nested, targets: Tensor | Mixed
    ) -> tuple[Nested, Tensor | Mixed]:
        """Return a batch, moved here."""
        moved = pytree.apply(lambda tensor: tensor.to(self.target), inputs)
        return moved, targets.to(self.target)


def build() -> dict[str, str]:
    """Return what decides bits on the CPU besides the recipe."""
    return {
        "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        **conditions.of_machine(),
    }


def gpus() -> Gpus:
    """Look for GPUs. Initialises CUDA, so never call it in a process that forks.

    A name has the compute capability in it: both decide bits, like the versions.
    """
    if torch.version.cuda is None:
        return Gpus(why=f"this build of PyTorch ({torch.__version__}) has no CUDA")
    if not torch.cuda.is_available():
        return Gpus(why="torch.cuda.is_available() is false: no GPU, or no driver")
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"{name}, compute capability {major}.{minor}")
    cudnn: int = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return Gpus(tuple(names), f"CUDA {torch.version.cuda}, cuDNN {cudnn}")
