"""The workers that torchrun started, or this process alone."""

import atexit
import json
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samestep.errors import PlacementError
from samestep.system import machine


def _leave() -> None:
    """At the end of the script: threads of a group that is left abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Group:
    """A process group over Gloo; nothing is communicated by one worker alone."""

    def __init__(self) -> None:
        """From the environment variables that torchrun sets."""
        self.workers = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ["RANK"]) if self.workers > 1 else 0

    def join(self, timeout_seconds: float) -> None:
        """All workers. On one machine they only use the loopback interface.

        A process group over Gloo that is there already is taken. Raises PlacementError
        if it is another one.
        """
        if self.workers == 1:
            return
        if not dist.is_initialized():
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", machine.loopback())
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
            atexit.register(_leave)
        if "gloo" not in dist.get_backend():
            raise PlacementError(
                "The workers exchange over Gloo, and the process group that is there "
                f"is of `{dist.get_backend()}`. Leave out `init_process_group`."
            )

    def merge(self, values: Tensor) -> Tensor:
        """All workers: float64 cells that only one worker has filled, from each."""
        if self.workers > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """All workers: everybody's value, as JSON, by rank."""
        if self.workers == 1:
            return [value]
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.workers, dtype=torch.float64)
        sizes[self.rank] = len(raw)
        lengths = [int(size) for size in self.merge(sizes).tolist()]
        sent = torch.zeros(max(lengths), dtype=torch.uint8)
        sent[: len(raw)] = raw
        received = torch.empty(self.workers, max(lengths), dtype=torch.uint8)
        dist.all_gather_single(received.view(-1), sent)
        return [
            json.loads(row[:length].numpy().tobytes())
            for row, length in zip(received, lengths, strict=True)
        ]
