"""The workers that torchrun started, or this process alone."""

import atexit
import json
import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from samestep.errors import PlacementError
from samestep.exchange import Merger
from samestep.system import machine


AT_ONCE = 255
"""Bytes of each worker that `gather` sends with their number; more follow."""


def _leave() -> None:
    """Destroy the group at the end of a script: its threads would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Return the rank and the number of workers, of the group or as torchrun says."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]) if workers > 1 else 0), workers


def join(workers: int, timeout_seconds: float) -> None:
    """All workers: join a group over Gloo; on one machine, on the loopback interface.

    A group over Gloo that the script has made is used as it is. Raises PlacementError
    if it is of another backend.
    """
    if workers == 1:
        return
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", machine.loopback())
            _join_on_one_machine(timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        atexit.register(_leave)
    if "gloo" not in dist.get_backend():
        raise PlacementError(
            "The workers meet over Gloo, and the process group that is there "
            f"is of `{dist.get_backend()}`. Leave out `init_process_group`."
        )


def _join_on_one_machine(timeout: timedelta) -> None:
    """All workers: make the group, each time under names of its own.

    torchrun's agent keeps its store when it starts the workers again, with the
    addresses of those that have ended (https://github.com/pytorch/pytorch/issues/135712).
    On several machines the agents count restarts differently.
    """
    store, rank, workers = next(rendezvous("env://", timeout=timeout))
    names = f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    own = PrefixStore(names, store)
    dist.init_process_group(
        "gloo", store=own, rank=rank, world_size=workers, timeout=timeout
    )


class Group:
    """Adds up numbers of all workers before they have an exchange."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def merge(self, values: Tensor) -> Tensor:
        """All workers: fill float64 cells, each from the one worker that has it."""
        dist.all_reduce(values)
        return values


def gather(exchange: Merger, rank: int, value: Any) -> list[Any]:
    """All workers: return everyone's value, as JSON, by rank."""
    text = json.dumps(value).encode()
    first = text[:AT_ONCE].ljust(AT_ONCE)
    sizes, rows = _gather(exchange, rank, first, len(text))
    left = max(sizes) - AT_ONCE
    if left > 0:
        _, more = _gather(exchange, rank, text[AT_ONCE:].ljust(left))
        rows = [first + rest for first, rest in zip(rows, more, strict=True)]
    return [json.loads(row) for row in rows]  # JSON ignores the spaces at its end


def _gather(
    exchange: Merger, rank: int, row: bytes, number: int = 0
) -> tuple[list[int], list[bytes]]:
    """All workers: return everyone's number, and their bytes, equally many, by rank."""
    every = np.zeros((exchange.workers, 1 + len(row)))
    every[rank, 0], every[rank, 1:] = number, np.frombuffer(row, np.uint8)
    found = exchange.merge(torch.from_numpy(every)).numpy()
    return (
        [int(size) for size in found[:, 0]],
        [cells.tobytes() for cells in found[:, 1:].astype(np.uint8)],
    )
