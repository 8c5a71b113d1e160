"""Where a worker is among all: in which process, on which machine."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """This worker among all. The workers of a node, a machine, have ranks in a row."""

    rank: int
    workers: int
    """On all nodes."""
    local_rank: int
    """Among those of this node."""
    local_workers: int
    address: str = "127.0.0.1"
    """Where rank 0 serves the store, by which the workers find each other."""
    port: int = 0
    node: int = 0
    nodes: int = 1

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> "Topology":
        """From the variables that torchrun sets."""
        return cls(
            rank=int(variables["RANK"]),
            workers=int(variables["WORLD_SIZE"]),
            local_rank=int(variables["LOCAL_RANK"]),
            local_workers=int(variables["LOCAL_WORLD_SIZE"]),
            address=variables["MASTER_ADDR"],
            port=int(variables["MASTER_PORT"]),
            node=int(variables["GROUP_RANK"]),
            nodes=int(variables["GROUP_WORLD_SIZE"]),
        )

    @classmethod
    def on_one_node(cls, rank: int, workers: int, port: int = 0) -> "Topology":
        """Where all workers are on this machine."""
        return cls(rank, workers, rank, workers, port=port)

    @property
    def is_leader(self) -> bool:
        """Whether it speaks for its node."""
        return self.local_rank == 0

    @property
    def local_ranks(self) -> tuple[int, int]:
        """The range `[a, b)` of the ranks of its node."""
        first = self.rank - self.local_rank
        return first, first + self.local_workers
