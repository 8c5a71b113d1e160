"""The run directory, the console and the trackers of a training.

Imports `user_code` and below.
"""
