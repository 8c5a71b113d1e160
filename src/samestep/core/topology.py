"""The ranks of workers on machines, in the terms of torchrun."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The place of this worker; those of one node (machine) have consecutive ranks."""

    rank: int
    workers: int
    """The world size: workers on all nodes."""
    local_rank: int
    """The rank among the workers of this node."""
    local_workers: int
    address: str = "127.0.0.1"
    """The host where rank 0 serves the store through which workers connect."""
    port: int = 0
    node: int = 0
    nodes: int = 1

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> "Topology":
        """Read the environment variables that torchrun sets."""
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
        """Return the topology of a worker when all are on this machine."""
        return cls(rank, workers, rank, workers, port=port)

    @property
    def is_leader(self) -> bool:
        """Whether this worker reports for its node."""
        return self.local_rank == 0

    @property
    def local_ranks(self) -> tuple[int, int]:
        """The range `[first, end)` of the ranks of this node."""
        first = self.rank - self.local_rank
        return first, first + self.local_workers
