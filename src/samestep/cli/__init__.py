"""The command line: thin, and free of slow imports until a command needs them.

Imports everything below.
"""
