"""Portable arithmetic: kernels in C, and the programs that call them.

`csrc/` holds the kernels, `compiling` makes a library of them, `library` loads it.
`trace` records a module's passes, `lower` makes a program of them, `execution` runs it.
docs/arithmetic.md defines every bit. Imports `core` and below.
"""
