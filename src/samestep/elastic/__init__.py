"""Workers that torchrun starts, on one machine or on several.

`worker.take_part` is one worker from start to end; `leader` keeps the run of a machine.
Imports `api` and below. `docs/several-machines.md` explains the protocol.
"""
