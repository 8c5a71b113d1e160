"""Everything that a user may set: recipes and placements, as frozen models.

Imports `files` and below.
"""
