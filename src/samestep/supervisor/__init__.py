"""Starts, watches and restarts the workers of one machine. Never imports torch.

Imports `state` and below, and `data.sources`.
"""
