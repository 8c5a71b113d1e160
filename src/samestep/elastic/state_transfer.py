"""Send a state from the node that has it to those that lack it, over Gloo.

    lengths of the parts    head, JSON    parameters    states    tail    metrics.jsonl

The head has the SHA-256 of the other parts, checked before anything is used.
"""

import hashlib
import json
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
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.system.json_values import JsonObject


PARTS = 5


class Courier:
    """A process group of the leaders of all nodes."""

    def __init__(self, store: Store, node: int, nodes: int, seconds: float) -> None:
        """All leaders: connect through `store`, which must be fresh."""
        self._node = node
        timeout = timedelta(seconds=seconds)
        # `Any`: torch's stub of this class lacks `send` and `recv`.
        self._group: Any = ProcessGroupGloo(
            PrefixStore("transfer", store), node, nodes, timeout
        )

    def send(self, held: Held, nodes: Sequence[int]) -> None:
        """Send a state to `nodes`. Raises RuntimeError if a receiver is lost."""
        parts = _pack(held)
        lengths = torch.tensor([len(part) for part in parts])
        for node in nodes:
            self._group.send([lengths], node, 0).wait()
            for part in parts:
                if len(part):
                    self._group.send([part], node, 0).wait()

    def receive(self, node: int) -> Held:
        """Receive a state from `node`. Raises PeerLost, or RuntimeError of torch."""
        lengths = torch.empty(PARTS, dtype=torch.int64)
        self._group.recv([lengths], node, 0).wait()
        parts = []
        for length in lengths.tolist():
            part = torch.empty(length, dtype=torch.uint8)
            if length:
                self._group.recv([part], node, 0).wait()
            parts.append(part)
        return _unpack(parts)


def _pack(held: Held) -> list[Tensor]:
    state = held.state
    body = [
        _bytes(state.parameters),
        _bytes(state.states),
        _bytes(state.tail),
        torch.tensor(bytearray(held.metrics.encode()), dtype=torch.uint8),
    ]
    head = {
        "progress": state.progress,
        "layout": held.layout.to_dict(),
        "recipe": held.recipe.to_dict(),
        "build": held.build,
        "epochs": held.epochs,
        "sha256": _sha256(body),
    }
    text = bytearray(json.dumps(head).encode())
    return [torch.tensor(text, dtype=torch.uint8), *body]


def _unpack(parts: Sequence[Tensor]) -> Held:
    head: JsonObject = json.loads(parts[0].numpy().tobytes())
    body = parts[1:]
    if _sha256(body) != head["sha256"]:
        raise PeerLost(
            "A state must arrive as it was sent, and its SHA-256 differs: the network "
            "or a memory has changed bits. Start again."
        )
    layout = Layout.model_validate(head["layout"])
    vectors = [part.numpy().view(layout.dtype) for part in body[:3]]
    state = State(
        head["progress"],
        vectors[0],
        vectors[1].reshape(len(layout.states), layout.size),
        vectors[2],
    )
    return Held(
        state,
        layout,
        Recipe.from_dict(head["recipe"]),
        head["build"],
        head["epochs"],
        body[3].numpy().tobytes().decode(),
    )


def _bytes(vector: Any) -> Tensor:
    flat = np.ascontiguousarray(vector).reshape(-1)
    return torch.from_numpy(flat.view(np.uint8))


def _sha256(parts: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().data)
    return digest.hexdigest()
