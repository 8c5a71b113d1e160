"""Draws micro-batches: in the worker, or ahead of time in a helper process.

The worker forks its helper before it loads anything. The helper loads the data itself,
so the two share no open file, cache or random generator. While the worker computes one
micro-batch, the helper draws the next and sends it, with the states of the generators
after drawing, from which the model draws next. So it makes no difference to the bits
which process has drawn a micro-batch. After a failure of the helper the worker draws
for itself, and raises the same error with its own traceback.
"""

import json
import struct
from collections.abc import Callable, Iterable
from itertools import count
from multiprocessing.connection import Connection
from typing import NamedTuple

import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from samestep.core.ownership import shares
from samestep.core.plan import Plan, derive_seed
from samestep.data import pytree
from samestep.data.augment import Mixed
from samestep.data.dataset import Dataset
from samestep.data.plans import StreamPlan
from samestep.data.pytree import Nested
from samestep.system import child_process
from samestep.system.json_values import JsonObject
from samestep.user_code import seeding


LEAST_SHARE = 0.1
"""Share of the time of a step that drawing must take before the helper is used."""
LEAST_SECONDS = 1e-3
"""Seconds that drawing a micro-batch must take; sending it takes a few tenths of it."""
REQUEST = struct.Struct("<qq")
PREPARE = b"prepare"
"""Asks the helper to load its data; it answers with the same, or nothing on failure."""

Drawn = tuple[Nested, Tensor | Mixed]


class MicroBatches:
    """The micro-batches of a training, by step and index."""

    def __init__(self, data: Dataset, plan: Plan, has_user_code: bool = False) -> None:
        """Seed Python's and numpy's generators, too, if `has_user_code`."""
        self._data, self._plan = data, plan
        self._has_user_code = has_user_code
        self._epoch, self._order = -1, torch.empty(0)

    def draw(self, step: int, index: int) -> Drawn:
        """Draw a micro-batch, inputs [b, ...] and targets.

        Steps count from 0 over all epochs. Seeds the generators, from which the model
        draws next.
        """
        plan = self._plan
        epoch, _ = plan.place(step)
        if isinstance(plan, StreamPlan):
            return self._of_stream(plan, step, index)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, plan.order(epoch)
        samples = plan.micro_batch(self._order, step, index)
        self._seed(step, index)
        return self._data.draw(samples, epoch)

    def replay(self, step: int, index: int) -> Drawn:
        """Draw a micro-batch out of turn: of a stream, its first samples.

        They are for this step otherwise.
        """
        if not isinstance(self._plan, StreamPlan):
            return self.draw(step, index)
        self._seed(step, index)
        return self._data.draw(torch.arange(len(self._plan.head)), 0)

    def _of_stream(self, plan: StreamPlan, step: int, index: int) -> Drawn:
        read, (start, _) = plan.samples(step), plan.bounds(step)
        first, end = shares(len(read), plan.micro_batches)[index]
        self._seed(step, index)
        samples = torch.arange(start + first, start + end)
        return self._data.draw(samples, plan.place(step)[0], (start, read))

    def _seed(self, step: int, index: int) -> None:
        seed = derive_seed(self._plan.seed, "step", step, index)
        if self._has_user_code:
            seeding.seed(seed)
        else:
            torch.default_generator.manual_seed(seed)


class HelperProcess(NamedTuple):
    """The worker's end of the connection to its helper process."""

    connection: Connection
    pid: int

    @classmethod
    def start(
        cls, load: Callable[[], MicroBatches], unused: Iterable[int]
    ) -> "HelperProcess":
        """Fork the helper; see `child_process.fork`."""
        return cls(*child_process.fork(lambda ours: _serve(ours, load), unused))


class Prefetcher:
    """A worker's source of micro-batches: its own, or that of its helper."""

    def __init__(
        self,
        source: MicroBatches,
        helper: HelperProcess | None,
        report: Callable[[], None],
        is_slow: bool = False,
    ) -> None:
        """Call `report` once, when the helper begins to load its data.

        It begins at once if drawing `is_slow`.
        """
        self._source, self._helper, self._report = source, helper, report
        self._is_preparing = self._helps = False
        self._ahead: tuple[int, int] | None = None
        """The micro-batch that the helper was asked for."""
        if is_slow and helper is not None:
            self._prepare()

    def draw(self, step: int, index: int, owned: tuple[int, int]) -> Drawn:
        """Draw one of the worker's `owned` micro-batches of a step, in their order."""
        if self._is_preparing:
            self._look()
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
        return drawn or self._source.replay(step, index)

    def observe(self, micro_batches: int, data_seconds: float, seconds: float) -> None:
        """Decide about the helper by the time that the last micro-batches took.

        `data_seconds` is that of drawing alone, `seconds` that of the whole step.
        """
        if self._helper is None or self._helps or self._is_preparing:
            return
        least = max(LEAST_SHARE * seconds, LEAST_SECONDS * micro_batches)
        if data_seconds > least:
            self._prepare()

    def _prepare(self) -> None:
        """Let the helper load its data."""
        if self._send(PREPARE):
            self._is_preparing = True
            self._report()

    def _look(self) -> None:
        """Use the helper once it has loaded its data, which may take minutes."""
        assert self._helper is not None
        if self._helper.connection.poll():
            self._helps = self._receive() == PREPARE
            self._is_preparing = False

    def _ask(self, wanted: tuple[int, int]) -> None:
        """Ask for one micro-batch, at most one at a time."""
        if self._send(REQUEST.pack(*wanted)):
            self._ahead = wanted

    def _received(self, step: int, index: int) -> Drawn | None:
        """Return the helper's micro-batch, and set the generators.

        None if it is another one, after a change of ownership, or if the helper failed.
        """
        asked, self._ahead = self._ahead, None
        content = b"" if asked is None else self._receive()
        drawn = _unpacked(content) if content else None
        return drawn if asked == (step, index) else None

    def _send(self, content: bytes) -> bool:
        """Return whether the helper is still there; else it is given up."""
        assert self._helper is not None
        try:
            self._helper.connection.send_bytes(content)
        except OSError:
            self._give_up()
            return False
        return True

    def _receive(self) -> bytes:
        """Return the helper's answer; if it has failed or ended, give it up.

        There is no timeout: the supervisor ends a worker whose data are too slow.
        """
        assert self._helper is not None
        try:
            content = self._helper.connection.recv_bytes()
        except (EOFError, OSError):
            content = b""
        if not content:
            self._give_up()
        return content

    def _give_up(self) -> None:
        self._is_preparing = self._helps = False
        self._helper = None


def _serve(connection: Connection, load: Callable[[], MicroBatches]) -> None:
    """Draw what the worker asks for until it has ended: the helper's main loop."""
    source, before = None, seeding.other_states()
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            source = source or load()
            if request == PREPARE:
                connection.send_bytes(PREPARE)
                continue
            step, index = REQUEST.unpack(request)
            # `_packed` leaves out states that drawing has not changed, which it sees by
            # comparing with `before`.
            seeding.set_other_states(before)
            content = _packed(source.draw(step, index), before)
        except Exception:  # the worker draws for itself and raises it, too
            content = b""
        connection.send_bytes(content)


def _packed(drawn: Drawn, before: JsonObject) -> bytes:
    inputs, targets = drawn
    parts = (targets,) if isinstance(targets, Tensor) else targets.parts
    after = seeding.other_states()
    others = after if after != before else None
    structure = pytree.apply(lambda _: None, inputs)
    words = json.dumps({"others": others, "inputs": structure}).encode()
    tensors = {
        "generator": torch.default_generator.get_state(),
        "words": torch.frombuffer(bytearray(words), dtype=torch.uint8),
    }
    for number, (_, values) in enumerate(pytree.leaves(inputs)):
        tensors[f"input{number}"] = values
    for number, part in enumerate(parts):
        tensors[f"targets{number}"] = part
    return safetensors.numpy.save({n: t.numpy() for n, t in tensors.items()})


def _unpacked(content: bytes) -> Drawn:
    tensors = safetensors.torch.load(content)
    torch.default_generator.set_state(tensors["generator"])
    words = json.loads(tensors["words"].numpy().tobytes())
    if words["others"] is not None:
        seeding.set_other_states(words["others"])
    leaves = (tensors[f"input{number}"] for number in count())
    inputs = pytree.restore(words["inputs"], leaves)
    parts = [tensors[name] for name in sorted(tensors) if name.startswith("targets")]
    targets = parts[0] if len(parts) == 1 else Mixed(*parts)
    return inputs, targets
