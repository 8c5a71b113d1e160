"""The loop and its parts. Read `train.py` first; `worker.py` is the process.

Imports `verification` and below.
"""
