"""From a summed gradient to new parameters: clipping, optimizers, weight averages.

Imports `exchange` and below.
"""
