"""Draws micro-batches: in the worker, or ahead of time in a helper process.

The worker forks its helper before it loads anything. The helper loads the data itself,
so the two share no open file, cache or random generator. While the worker computes one
step, the helper draws the worker's micro-batches of the next, and sends each with the
states of the generators after drawing, from which the model draws next. So it makes no
difference to the bits which process has drawn a micro-batch.

Of a stream, the helper also says how long each global batch is and where it lies, and
the worker does not read it. If user code fails in the helper, the worker raises the
same error; after any other failure of the helper the worker draws for itself.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from samestep.core.ownership import shares
from samestep.core.plan import Plan, derive_seed
from samestep.core.progress import StreamPosition
from samestep.data import pytree
from samestep.data.augment import Mixed
from samestep.data.dataset import Dataset
from samestep.data.plans import StreamPlan
from samestep.data.pytree import Nested
from samestep.data.reader import ReadBatch, StreamReader
from samestep.errors import OwnCodeError
from samestep.system import child_process
from samestep.system.json_values import JsonObject
from samestep.user_code import seeding
from samestep.user_code.imports import user_frames


LEAST_SHARE = 0.1
"""Share of the time of a step that drawing must take before the helper is used."""
LEAST_SECONDS = 1e-3
"""Seconds that drawing a micro-batch must take; sending it takes a few tenths of it."""
# In place of a micro-batch's index.
READ = -1
"""Asks what the global batch of a stream is."""
PREPARE = -2
"""Asks to load the data, and to read a stream up to a step; the answer is the step."""
FAILED = b"failed"
"""Before the error of user code, in place of an answer; other failures are empty."""

Drawn = tuple[Nested, Tensor | Mixed]


class MicroBatches:
    """The micro-batches of a training, by step and index."""

    def __init__(self, data: Dataset, plan: Plan, has_user_code: bool = False) -> None:
        """Seed Python's and numpy's generators, too, if `has_user_code`."""
        self._data, self._plan = data, plan
        self.has_user_code = has_user_code
        self._epoch, self._order = -1, torch.empty(0)

    @property
    def reader(self) -> StreamReader | None:
        """What reads the samples if they are a stream."""
        return self._plan.reader if isinstance(self._plan, StreamPlan) else None

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
        if self.has_user_code:
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

        It begins with the first micro-batch if drawing `is_slow`.
        """
        self._source, self._helper, self._report = source, helper, report
        self._reader, self._is_slow = source.reader, is_slow
        self._is_preparing = self._helps = False
        self._step = -1
        self._asked: deque[tuple[int, int]] = deque()
        """Step and index of what the helper still has to answer, in its order."""
        self._answers: dict[tuple[int, int], bytes] = {}
        """All that it was asked for and is still needed; empty: to come."""

    def draw(self, step: int, index: int, owned: tuple[int, int]) -> Drawn:
        """Draw one of the worker's `owned` micro-batches of a step, in their order.

        Raises OwnCodeError.
        """
        if self._is_preparing:
            self._look(step)
        elif self._is_slow and not self._helps and self._helper is not None:
            self._report()
            self._prepare(step)
        if self._helps and step != self._step:
            self._step = step
            self._answers = {k: a for k, a in self._answers.items() if k[0] >= step}
            self._ask(step, *range(index, owned[1]))
            # Of a stream, first of all where the step lies, which all else follows.
            self._ask(step + 1, *([READ] if self._reader else []), *range(*owned))
        return self._received(step, index) or self._source.draw(step, index)

    def replay(self, step: int, index: int) -> Drawn:
        """Draw any micro-batch out of turn, where the worker's own are drawn."""
        drawn = None if self._reader else self._received(step, index)
        return drawn or self._source.replay(step, index)

    def observe(self, micro_batches: int, data_seconds: float, seconds: float) -> None:
        """Decide about the helper by the time that the last micro-batches took.

        `data_seconds` is that of drawing alone, `seconds` that of the whole step.
        """
        reading = self._reader.take_seconds() if self._reader else 0.0
        least = max(LEAST_SHARE * seconds, LEAST_SECONDS * micro_batches)
        self._is_slow = self._is_slow or data_seconds + reading > least

    def _prepare(self, step: int) -> None:
        """Let the helper load its data, and read a stream up to this step."""
        reader = self._reader
        position = reader.at(step).position.model_dump() if reader else None
        self._is_preparing = self._send(step, [PREPARE], position)

    def _look(self, step: int) -> None:
        """Use the helper once it has its data, which may take minutes."""
        assert self._helper is not None
        if not self._helper.connection.poll():
            return
        answer, self._is_preparing = self._receive(), False
        if not answer.isdigit():
            self._give_up()
        elif self._reader and int(answer) + 1 < step:
            self._prepare(step)  # the worker has gone on meanwhile
        else:
            self._helps = True
            if self._reader:
                self._reader.follow(self._read)

    def _read(self, step: int) -> ReadBatch | None:
        """Return what the helper says about a global batch; None if it has failed."""
        answer = self._answer(step, READ)
        if not answer:
            return None
        values = json.loads(answer)
        position = StreamPosition.model_validate(values["position"])
        return ReadBatch(position, values["size"], None, values["digest"])

    def _received(self, step: int, index: int) -> Drawn | None:
        """Return the helper's micro-batch, and set the generators.

        None if it does not help, or has failed.
        """
        answer = self._answer(step, index)
        return _unpacked(answer) if answer else None

    def _ask(self, step: int, *indices: int) -> None:
        """Ask for what was not asked for."""
        wanted = [i for i in indices if (step, i) not in self._answers]
        if self._helps and wanted and self._send(step, wanted):
            self._asked.extend((step, i) for i in wanted)
            self._answers |= {(step, i): b"" for i in wanted}

    def _answer(self, step: int, index: int) -> bytes:
        """Wait for an answer, empty if there is none. Raises OwnCodeError."""
        self._ask(step, index)
        while self._helps and not self._answers[step, index]:
            answer = self._receive()
            if answer:
                self._answers[self._asked.popleft()] = answer
        answer = self._answers.pop((step, index), b"")
        if answer.startswith(FAILED):
            message, frames = json.loads(answer.removeprefix(FAILED))
            error = OwnCodeError(message)
            error.add_note(frames)
            raise error
        return answer

    def _send(
        self, step: int, indices: list[int], position: JsonObject | None = None
    ) -> bool:
        """Return whether the helper is still there; else it is given up."""
        request = json.dumps([step, indices, position]).encode()
        try:
            assert self._helper is not None
            self._helper.connection.send_bytes(request)
        except OSError:
            self._give_up()
            return False
        return True

    def _receive(self) -> bytes:
        """Return the helper's answer; if it has failed or ended, give it up.

        There is no timeout: the supervisor ends a worker whose data are too slow.
        """
        try:
            assert self._helper is not None
            answer = self._helper.connection.recv_bytes()
        except (EOFError, OSError):
            answer = b""
        if not answer:
            self._give_up()
        return answer

    def _give_up(self) -> None:
        self._is_preparing = self._helps = False
        self._helper = None
        self._asked.clear()
        self._answers.clear()
        if self._reader:
            self._reader.take_over()


def _serve(connection: Connection, load: Callable[[], MicroBatches]) -> None:
    """Draw what the worker asks for until it has ended: the helper's main loop."""
    source, answers = None, SimpleQueue[bytes]()
    # Beside it, since the worker takes an answer only when it needs that.
    Thread(target=_send_all, args=(connection, answers), daemon=True).start()
    while True:
        try:
            step, indices, position = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        for index in indices:
            try:
                source = source or load()
                answer = _answered(source, step, index, position)
            except OwnCodeError as error:
                frames = user_frames(error.__cause__ or error)
                answer = FAILED + json.dumps([str(error), frames]).encode()
            except Exception:  # the worker draws for itself, and raises it, too
                answer = b""
            answers.put(answer)


def _send_all(connection: Connection, answers: "SimpleQueue[bytes]") -> None:
    with suppress(OSError):  # the worker has ended
        while True:
            connection.send_bytes(answers.get())


def _answered(
    source: MicroBatches, step: int, index: int, position: JsonObject | None
) -> bytes:
    reader = source.reader
    if index == PREPARE:
        if reader and position is not None:
            reader.catch_up(step, StreamPosition.model_validate(position))
        return str(step).encode()
    if index != READ or reader is None:
        return _packed(source.draw(step, index), source.has_user_code)
    read = reader.at(step)
    told = {"size": read.size, "digest": read.sketch}
    return json.dumps(told | {"position": read.position.model_dump()}).encode()


def _packed(drawn: Drawn, has_user_code: bool) -> bytes:
    inputs, targets = drawn
    parts = (targets,) if isinstance(targets, Tensor) else targets.parts
    others = seeding.other_states() if has_user_code else None
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
