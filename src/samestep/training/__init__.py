"""The training loop and its parts. Read `train.py` first.

`trainer.py` has the parts of a worker, `build.py` puts them together, `worker.py` is
the process. Imports `verification` and below.
"""
