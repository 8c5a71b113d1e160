"""Portable arithmetic: kernels in C that docs/arithmetic.md defines bit by bit.

`csrc/` holds the sources, `compiling` makes a library of them, `library` loads it.
"""
