"""Documents of plain blocks, rendered as HTML or Word, with figures.

Imports `system`.
"""
