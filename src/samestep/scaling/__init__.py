"""`samestep scale`: measures how a recipe scales here, and predicts how it would.

settings -> points -> measure (interleaved, resumable) -> summary -> fit -> predict
-> advice -> scaling.json, scaling.csv, report
"""
