"""`samestep doctor`: what would go wrong, before it does. Nothing here needs torch.

`facts.py` observes; `hardware.py`, `software.py`, `network.py`, `links.py` and
`comparing.py` judge what was observed and are pure. `probing.py` asks another machine,
where `serving.py` answers, over `wire.py`.
"""
