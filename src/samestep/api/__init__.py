"""What Python callers call: train, resume, evaluate, check, load, export, sample.

Imports `report` and below.
"""
