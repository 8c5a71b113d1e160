"""One module for each source of data, and what the supervisor does with them.

Imports `data` and below.
"""
