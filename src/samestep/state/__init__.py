"""The state of a training between two steps: vectors, snapshots, checkpoints.

Imports `output` and below.
"""
