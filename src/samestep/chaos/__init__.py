"""Failure injection: trainings under a schedule of faults.

Imports `api` and below.
"""
