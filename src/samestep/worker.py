"""Run one worker that torchrun has started: `torchrun -m samestep.worker train ...`."""

import os
import sys


if __name__ == "__main__":
    # The order of a set of strings may decide bits. Before the import, which takes as
    # long as that of torch.
    if sys.flags.hash_randomization:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606
    from samestep.cli.worker import main

    main()
