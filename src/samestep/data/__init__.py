"""Samples on their way to a worker; `sources` has a module for each kind of data.

Imports `state` and below.
"""
