"""Starts, watches and restarts the workers of one machine. Never imports torch.

Imports `config`, `data.sources`, `state`, `output` and `system`.
"""
