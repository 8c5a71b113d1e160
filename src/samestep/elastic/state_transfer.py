"""Send a state from the node that has it to those that lack it, over Gloo.

It travels as a NumPy archive, without pickles, after its length and its SHA-256, which
is checked before anything is used.
"""

import hashlib
import io
import json
import struct
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from samestep.config.recipe import Recipe
from samestep.elastic.node_state import Held
from samestep.errors import PeerLost
from samestep.output import ledger
from samestep.state.layout import Layout
from samestep.state.snapshot import State


HEAD = struct.Struct("!q32s")
VECTORS = ("parameters", "states", "tail")


class Courier:
    """A process group of the leaders of all nodes."""

    def __init__(self, store: Store, node: int, nodes: int, seconds: float) -> None:
        """All leaders: connect through `store`, which must be fresh."""
        timeout = timedelta(seconds=seconds)
        # `Any`: torch's stub of this class lacks `send` and `recv`.
        self._group: Any = ProcessGroupGloo(
            PrefixStore("transfer", store), node, nodes, timeout
        )

    def send(self, held: Held, nodes: Sequence[int]) -> None:
        """Send a state to `nodes`. Raises RuntimeError if a receiver is lost."""
        body = _pack(held)
        head = bytearray(HEAD.pack(len(body), _sha256(body)))
        for node in nodes:
            self._group.send(
                [torch.frombuffer(head, dtype=torch.uint8)], node, 0
            ).wait()
            self._group.send([body], node, 0).wait()

    def receive(self, node: int) -> Held:
        """Receive a state from `node`. Raises PeerLost, or RuntimeError of torch."""
        length, sha256 = HEAD.unpack(self._receive(node, HEAD.size).numpy().data)
        body = self._receive(node, length)
        if _sha256(body) != sha256:
            raise PeerLost(
                "A state must arrive as it was sent, and its SHA-256 differs: the "
                "network or a memory has changed bits. Start again."
            )
        return _unpack(body)

    def _receive(self, node: int, size: int) -> Tensor:
        content = torch.empty(size, dtype=torch.uint8)
        self._group.recv([content], node, 0).wait()
        return content


def _pack(held: Held) -> Tensor:
    about = {
        "progress": held.state.progress,
        "layout": held.layout.to_dict(),
        "recipe": held.recipe.to_dict(),
        "build": held.build,
        "epochs": held.epochs,
        "metrics": held.metrics,
    }
    parts = {name: getattr(held.state, name) for name in VECTORS}
    files = {"about": json.dumps(about).encode(), **held.ledgers}
    parts |= {name: np.frombuffer(file, np.uint8) for name, file in files.items()}
    content = io.BytesIO()
    np.savez(content, **parts)
    return torch.frombuffer(content.getbuffer(), dtype=torch.uint8)


def _unpack(body: Tensor) -> Held:
    with np.load(io.BytesIO(body.numpy().data)) as parts:
        vectors = [parts[name] for name in VECTORS]
        about = json.loads(parts["about"].tobytes())
        ledgers = {n: parts[n].tobytes() for n in ledger.FILES if n in parts}
    return Held(
        State(about["progress"], *vectors),
        Layout.model_validate(about["layout"]),
        Recipe.from_dict(about["recipe"]),
        about["build"],
        about["epochs"],
        about["metrics"],
        ledgers,
    )


def _sha256(content: Tensor) -> bytes:
    return hashlib.sha256(content.numpy().data).digest()
