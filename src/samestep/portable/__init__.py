"""Training and evaluation by recorded programs, for `arithmetic = "portable"`.

Imports `optim` and below.
"""
