"""Checks that the result depends on the recipe alone, before and during a training.

Imports `optim` and below.
"""
