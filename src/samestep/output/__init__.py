"""What a training leaves behind and shows: the run directory, the console, trackers.

Imports `user_code` and below.
"""
