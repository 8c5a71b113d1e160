"""What a training is between two steps: vectors, snapshots in memory, checkpoints.

Imports `output` and below.
"""
