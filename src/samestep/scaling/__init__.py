"""`samestep scale`: measures how a recipe scales here, and predicts beyond it.

grid -> measure (interleaved, resumable) -> intervals -> fit -> predict -> advice ->
scaling.json, scaling.csv, report. Imports `supervisor`, `report` and below.
"""
