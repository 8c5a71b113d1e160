"""The user's functions and objects: named, checked, sent to the workers, seeded.

Imports `core` and below.
"""
