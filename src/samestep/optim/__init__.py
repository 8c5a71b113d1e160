"""The update of a slice of the parameters; averages of weights.

Imports `exchange` and below.
"""
