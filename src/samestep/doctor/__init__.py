"""`samestep doctor`: what would go wrong, before it does. Does not import torch.

`observe` looks at a machine; the modules `check_*` judge what it saw and are pure.
`peer_client` asks another machine, where `peer_server` answers, over `peer_protocol`.
Imports `system`.
"""
