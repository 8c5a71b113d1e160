"""`samestep doctor`: what would go wrong, before it does. Does not import torch.

`observe` looks at a machine; the modules `check_*` judge what it saw and are pure.
`peer` measures the link to another machine, where it also answers.
Imports `system`.
"""
