"""Pure decisions, the same on every worker: the plan, the tree, ownership, schedules.

Imports `config` and below.
"""
