"""Ray Train starts the workers: TorchTrainer in torchrun's place.

pip install 'samestep[ray]'
python ray_train.py --workers 2 --run runs/ray mnist-mlp

What follows the options is for `python -m samestep.worker train`. Ray gives the places,
starts all workers again after a failure, and takes machines that join or leave
(`--workers 1:4`); the training goes on from the newest state that a machine holds.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray.train
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(config: dict[str, Any]) -> None:
    """Every worker, in a process of Ray's. Raises CalledProcessError."""
    where = ray.train.get_context()
    port = free_port() if where.get_world_rank() == 0 else 0
    # Nobody else has a port to tell, so the maximum is that of rank 0.
    told = torch.tensor([where.get_node_rank(), port])
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    last_node, port = told.tolist()
    environment = {
        "RANK": where.get_world_rank(),
        "WORLD_SIZE": where.get_world_size(),
        "LOCAL_RANK": where.get_local_rank(),
        "LOCAL_WORLD_SIZE": where.get_local_world_size(),
        "GROUP_RANK": where.get_node_rank(),
        "GROUP_WORLD_SIZE": last_node + 1,
        "MASTER_PORT": port,  # MASTER_ADDR is set by Ray
        "TORCHELASTIC_RUN_ID": where.get_experiment_name(),
    }
    subprocess.run(
        [sys.executable, "-m", "samestep.worker", "train", *config["arguments"]],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        cwd=config["directory"],
        check=True,
    )


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def main() -> None:
    """Raises TrainingFailedError once a failure has come more than three times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="2", metavar="N|MIN:MAX")
    parser.add_argument("--run", type=Path, required=True, help="The run directory.")
    ours, arguments = parser.parse_known_args()
    fewest, _, most = ours.workers.partition(":")
    run = ours.run.absolute()
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "arguments": [*arguments, "--out", str(run)],
            "directory": str(Path.cwd()),
        },
        scaling_config=ScalingConfig(
            num_workers=(int(fewest), int(most)) if most else int(fewest)
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=str(run.parent / "ray"),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
