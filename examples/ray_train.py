"""Start the workers with Ray Train: TorchTrainer instead of torchrun.

pip install 'samestep[ray]'
python ray_train.py --workers 2 --run runs/ray mnist-mlp

The other arguments are passed to `python -m samestep.worker train`. Ray assigns ranks,
restarts all workers after a failure, and handles machines that join or leave
(`--workers 1:4`); the training continues from the newest state that any machine holds.
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
    """Run one samestep worker in a Ray worker. Raises CalledProcessError."""
    context = ray.train.get_context()
    port = free_port() if context.get_world_rank() == 0 else 0
    # Only rank 0 has a port above 0, so the maximum is its port.
    maximum = torch.tensor([context.get_node_rank(), port])
    torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)
    last_node, port = maximum.tolist()
    environment = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
        "GROUP_WORLD_SIZE": last_node + 1,
        "MASTER_PORT": port,  # MASTER_ADDR is set by Ray
        "TORCHELASTIC_RUN_ID": context.get_experiment_name(),
    }
    subprocess.run(
        [sys.executable, "-m", "samestep.worker", "train", *config["arguments"]],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        cwd=config["directory"],
        check=True,
    )


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def main() -> None:
    """Train. Raises TrainingFailedError after more than three failures."""
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
