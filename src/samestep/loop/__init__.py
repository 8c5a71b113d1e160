"""`samestep.Loop`: exact results for people who keep their own training loop.

Imports `api` and below.
"""
