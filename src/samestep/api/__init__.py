"""The Python API: train, resume, evaluate, check, load, export, sample.

Imports `report` and below.
"""
