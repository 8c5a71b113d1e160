r"""Lightning, Accelerate and Transformers on two processes: samestep against their DDP.

    python benchmarks/integrations.py
    python benchmarks/integrations.py lightning --rounds 7

Every round trains once with each, in fresh processes, for EPOCHS epochs at a global
batch of 64 (`peers/integrated.py`). An epoch's time leaves out start-up; the first
epoch of each process is left out too. The ratio, DDP to samestep, is taken within a
round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import cleanup

from samestep.system import machine


SCRIPT = Path(__file__).parent / "peers" / "integrated.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LIBRARIES = {"lightning": (), "accelerate": TORCHRUN, "transformers": TORCHRUN}
"""Lightning starts its processes itself."""
PATIENCE = 600.0


def epoch(library: str, summed_by: str, epochs: int) -> float:
    """Return the seconds of an epoch, the median of all but the first."""
    arguments = [str(SCRIPT), library, summed_by, str(epochs)]
    with tempfile.TemporaryDirectory() as directory:
        ended = subprocess.run(
            [sys.executable, *LIBRARIES[library], *arguments],
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("[")]
    seconds: list[float] = json.loads(line)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", choices=[[], *LIBRARIES], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine.describe()['processor']}; seconds of an epoch")
    print(f"{'':14}    DDP  samestep   ratio (range)")
    for library in options.libraries or LIBRARIES:
        times: dict[str, list[float]] = {"ddp": [], "samestep": []}
        for number in range(options.rounds):
            for name in list(times)[:: -1 if number % 2 else 1]:
                times[name].append(epoch(library, name, options.epochs))
        ratios = [d / s for d, s in zip(*times.values(), strict=True)]
        ddp, ours = map(statistics.median, times.values())
        print(
            f"{library:14} {ddp:6.3f} {ours:9.3f} {statistics.median(ratios):7.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}), n={options.rounds}",
            flush=True,
        )


if __name__ == "__main__":
    cleanup.run(main)
