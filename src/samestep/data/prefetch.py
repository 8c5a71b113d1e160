"""Micro-batches to train on: drawn by the worker, or ahead of time by its helper.

A helper is a process that the worker forks before it loads anything. It loads the data
itself, so the two share no open file, no cache and no generator. While the worker
computes one micro-batch, the helper draws the next, and sends with it the state of the
generators that the drawing has left, from which the model goes on to draw. So who has
drawn a micro-batch changes no bit. A helper that fails is not asked again: the worker
then draws for itself, and meets the same error with its own traceback.
"""

import json
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from samestep.core.plan import Plan, derive_seed
from samestep.data import pytree
from samestep.data.augment import Mixed
from samestep.data.dataset import Dataset
from samestep.data.pytree import Nested
from samestep.system import child_process
from samestep.user_code import seeding


LEAST_SHARE = 0.1
"""Of the time of a step, that drawing takes before a helper does it."""
LEAST_SECONDS = 1e-3
"""The same for one micro-batch: to hand it over takes a few tenths of that."""
REQUEST = struct.Struct("<qq")

Drawn = tuple[Nested, Tensor | Mixed]


class MicroBatches:
    """All micro-batches of a training."""

    def __init__(self, data: Dataset, plan: Plan, has_own_code: bool = False) -> None:
        """Seed Python's and numpy's generators too where there is own code."""
        self._data, self._plan = data, plan
        self._has_own_code = has_own_code
        self._epoch, self._order = -1, torch.empty(0)

    def draw(self, step: int, index: int) -> Drawn:
        """Inputs [b, ...] and targets; steps count from 0 over all epochs.

        Seeds the generators, from which the model then draws.
        """
        plan = self._plan
        epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, plan.order(epoch)
        samples = plan.micro_batch(self._order, step_in_epoch, index)
        seed = derive_seed(plan.seed, "step", step, index)
        if self._has_own_code:
            seeding.seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        return self._data.draw(samples, epoch)


@dataclass
class Helper:
    """The worker's end of the connection to its helper."""

    connection: Connection
    pid: int

    @classmethod
    def start(cls, load: Callable[[], MicroBatches], unused: Iterable[int]) -> "Helper":
        """Fork the helper; see `child.fork`."""
        return cls(*child_process.fork(lambda ours: _serve(ours, load), unused))

    def request(self, step: int, index: int) -> None:
        """One at a time. Raises OSError if the helper has ended."""
        self.connection.send_bytes(REQUEST.pack(step, index))

    def receive(self) -> Drawn | None:
        """What was asked for last; sets the generators. None if that has failed.

        The supervisor ends a worker that waits too long, as for any slow data. Raises
        EOFError, OSError if the helper has ended.
        """
        content = self.connection.recv_bytes()
        return _unpacked(content) if content else None


class Prefetcher:
    """Where a worker gets its micro-batches from."""

    def __init__(
        self,
        source: MicroBatches,
        helper: Helper | None,
        report: Callable[[], None],
    ) -> None:
        """`report` is called when the helper begins."""
        self._source, self._helper, self._report = source, helper, report
        self._helps = False
        self._ahead: tuple[int, int] | None = None
        """What the helper was asked for."""

    def draw(self, step: int, index: int, owned: tuple[int, int]) -> Drawn:
        """One of the worker's `owned` micro-batches of a step."""
        drawn = self._received(step, index) if self._helps else None
        if drawn is None:
            drawn = self._source.draw(step, index)
        if self._helps:
            is_last = index + 1 == owned[1]
            self._ask((step + 1, owned[0]) if is_last else (step, index + 1))
        return drawn

    def replay(self, step: int, index: int) -> Drawn:
        """Draw any micro-batch out of turn, where the worker's own are drawn."""
        ahead, drawn = self._ahead, None
        if ahead is not None:
            self._received(*ahead)
        if self._helps:
            self._ask((step, index))
            drawn = self._received(step, index) if self._helps else None
        if self._helps and ahead is not None:
            self._ask(ahead)
        return drawn or self._source.draw(step, index)

    def observe(self, micro_batches: int, data_seconds: float, seconds: float) -> None:
        """What the worker's last micro-batches took, drawing alone and in all."""
        if self._helper is None or self._helps:
            return
        least = max(LEAST_SHARE * seconds, LEAST_SECONDS * micro_batches)
        if data_seconds > least:
            self._helps = True
            self._report()

    def _ask(self, wanted: tuple[int, int]) -> None:
        assert self._helper is not None
        try:
            self._helper.request(*wanted)
            self._ahead = wanted
        except OSError:
            self._give_up()

    def _received(self, step: int, index: int) -> Drawn | None:
        """None if the helper has another one, as ownership changed, or has failed."""
        asked, self._ahead = self._ahead, None
        if asked is None:
            return None
        assert self._helper is not None
        try:
            drawn = self._helper.receive()
        except (EOFError, OSError):
            drawn = None
        if drawn is None:
            self._give_up()
        return drawn if asked == (step, index) else None

    def _give_up(self) -> None:
        self._helps, self._helper = False, None


def _serve(connection: Connection, load: Callable[[], MicroBatches]) -> None:
    """The helper: draws what it is asked for until the worker has ended."""
    source, before = None, _other_generators()
    while True:
        try:
            step, index = REQUEST.unpack(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            source = source or load()
            # Or a micro-batch drawn twice would seem to leave them alone.
            _set_other_generators(before)
            content = _packed(source.draw(step, index), before)
        except Exception:  # the worker will meet it too, and tell
            content = b""
        connection.send_bytes(content)


def _packed(drawn: Drawn, before: dict[str, Any]) -> bytes:
    inputs, targets = drawn
    parts = (targets,) if isinstance(targets, Tensor) else targets.parts
    after = _other_generators()
    others = after if after != before else {}
    structure = pytree.apply(lambda _: None, inputs)
    tensors = {
        "generator": torch.default_generator.get_state(),
        "words": _encoded({"others": others, "inputs": structure}),
        **{
            f"input{number}": of for number, (_, of) in enumerate(pytree.leaves(inputs))
        },
        **{f"targets{number}": part for number, part in enumerate(parts)},
    }
    return safetensors.numpy.save({n: t.numpy() for n, t in tensors.items()})


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)


def _unpacked(content: bytes) -> Drawn:
    tensors = safetensors.torch.load(content)
    torch.default_generator.set_state(tensors["generator"])
    words = json.loads(tensors["words"].numpy().tobytes())
    _set_other_generators(words["others"])
    inputs = pytree.restore(words["inputs"], _numbered(tensors, "input"))
    parts = list(_numbered(tensors, "targets"))
    targets = parts[0] if len(parts) == 1 else Mixed(*parts)
    return inputs, targets


def _numbered(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    for number in count():
        if f"{name}{number}" not in tensors:
            return
        yield tensors[f"{name}{number}"]


def _other_generators() -> dict[str, Any]:
    """Python's and numpy's, as JSON values."""
    numbers = np.random.get_state(legacy=False)
    key = numbers["state"]["key"].tolist()
    state = {**numbers["state"], "key": key}
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": {**numbers, "state": state},
    }


def _set_other_generators(states: dict[str, Any]) -> None:
    if not states:
        return
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numbers = states["numpy"]
    key = np.array(numbers["state"]["key"], np.uint32)
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})
