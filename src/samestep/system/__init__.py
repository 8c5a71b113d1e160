"""The operating system: processes, memory, files, sockets, signals, the terminal.

Imports errors.
"""
