"""Run one worker that torchrun has started: `torchrun -m samestep.worker train ...`."""

import os
import sys

from samestep.cli.worker import main


if __name__ == "__main__":
    if sys.flags.hash_randomization:  # the order of a set of strings may decide bits
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606
    main()
