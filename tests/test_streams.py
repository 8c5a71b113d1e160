"""Streams that say where they are, and go on there without being read again."""

import json
import os
import random
import signal
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import network, threads
from torch.utils.data import DataLoader, IterableDataset

import samestep
from samestep.core.progress import StreamPosition
from samestep.data.given import GivenData
from samestep.data.prefetch import Drawn, HelperProcess, MicroBatches, Prefetcher
from samestep.data.reader import ReadBatch, StreamReader
from samestep.data.stream import RawBatch, read
from samestep.user_code import seeding


assert threads  # the fixture for every test here


class Told(IterableDataset[Any]):
    """A stream in an order of its epoch, which draws, and can say where it is."""

    def __init__(self, length: int = 30) -> None:
        self.length, self.epoch, self.read = length, 0, 0
        self._next = self._start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        order = random.Random(self.epoch).sample(range(self.length), self.length)
        self._next, self._start = self._start, 0
        while self._next < self.length:
            index = order[self._next]
            self._next += 1
            self.read += 1
            yield torch.full((5,), float(index)) + torch.rand(5), index % 3

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["next"]


class Buffered(Told):
    """Shuffles in a buffer that is no part of its state, as some libraries do."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        buffer: list[Any] = []
        for sample in super().__iter__():
            buffer.append(sample)
            if len(buffer) > 8:
                yield buffer.pop(random.randrange(8))
        yield from buffer


def batches_of(stream: Any, *position: Any) -> list[RawBatch]:
    """Read the second epoch, in global batches of 4."""
    with seeding.kept():
        return list(read(GivenData(stream, 4, list), 0, 1, *position))


def values(batches: list[RawBatch]) -> list[Any]:
    return [[x.tolist() for x, _ in batch.samples] for batch in batches]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_stream_goes_on_behind_a_bookmark_without_being_read_again(
    drop_last: bool,
) -> None:
    every = batches_of(Told())
    assert [batch.number for batch in every] == list(range(8))
    assert every[0].bookmark is None
    for earlier, start in ((1, 1), (4, 5), (4, 7), (7, 7)):
        bookmark = every[earlier].bookmark
        assert bookmark is not None
        assert bookmark.state == {"next": 4 * earlier}
        stream = Told()
        assert values(batches_of(stream, start, bookmark)) == values(every[start:])
        assert stream.read == 0, "it goes on with a copy"
    assert values(batches_of(Told(), 5)) == values(every[5:])


def test_a_stream_whose_state_lacks_a_buffer_is_read_again() -> None:
    every = batches_of(Buffered())
    bookmark = every[4].bookmark
    with pytest.warns(UserWarning, match="a buffer were not part of its state"):
        assert values(batches_of(Buffered(), 5, bookmark)) == values(every[5:])


class Closed(Told):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("an open file")


class Asking(Told):
    """Has a state_dict of another kind."""

    def state_dict(self, samples: int) -> dict[str, int]:  # type: ignore[override]
        raise AssertionError(samples)


def test_a_stream_that_cannot_go_on_behind_a_bookmark_is_read_again() -> None:
    every = batches_of(Closed())
    stream = Closed()
    assert values(batches_of(stream, 5, every[4].bookmark)) == values(every[5:])
    assert stream.read == 30
    assert all(batch.bookmark is None for batch in batches_of(Asking()))


class Talkative(Told):
    """Has a state that is large."""

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next, "rest": "x" * 100_000}


class Opaque(Told):
    """Has a state that is not JSON."""

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next, "rest": {1: (2, 3)}}


def numbers(batch: ReadBatch) -> list[Any]:
    assert batch.samples is not None
    return [x.tolist() for x, _ in batch.samples]


@pytest.mark.parametrize("kind", [Told, Talkative, Opaque])
def test_a_reader_goes_on_at_the_position_of_another(kind: type[Told]) -> None:
    whole = StreamReader(GivenData(kind(), 4, list), seed=0)
    batches = [whole.at(step) for step in range(20)]
    epochs = [batch.position.epoch for batch in batches]
    assert epochs == [0] * 8 + [1] * 8 + [2] * 4
    for step in (0, 3, 7, 8, 12, 15):
        before = StreamReader(GivenData(kind(), 4, list), seed=0)
        for earlier in range(step + 1):
            before.at(earlier)
        before.at(step + 2)  # read ahead
        position = json.loads(before.at(step).position.model_dump_json())
        stream = kind()
        after = StreamReader(GivenData(stream, 4, list), seed=0)
        after.go_to(step, StreamPosition.model_validate(position))
        for later in range(step, min(step + 3, 20)):
            assert after.at(later).position == batches[later].position
            assert numbers(after.at(later)) == numbers(batches[later])
        if step in (3, 12):
            assert (stream.read == 0) == (kind is Told)


def trained(stream: Any, processes: int, stop: int | None) -> tuple[str, list[str]]:
    """Train two epochs in a loop, saved and begun again after `stop` steps."""
    model = network()
    loop = samestep.Loop(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states: list[str] = []
    steps = 0
    while loop.epoch < 2:
        loader = DataLoader(stream, batch_size=7, num_workers=processes)
        for step in loop.steps(loader, epoch=loop.epoch):
            for x, y in step:
                loss = torch.nn.functional.cross_entropy(model(x), y)
                torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == stop:
                state = loop.state_dict()
                states.append(str(state["bookmark"] and state["bookmark"]["state"]))
                loop = samestep.Loop(model, 4)
                loop.load_state_dict(state)
                break
    return loop.fingerprint(), states


@pytest.mark.parametrize("processes", [0, 1])
def test_a_loop_saves_the_place_of_the_step_it_is_at(processes: int) -> None:
    """Not that of what was read ahead."""
    whole, _ = trained(Told(), processes, None)
    with warnings.catch_warnings(action="error"):
        fingerprint, states = trained(Told(), processes, 8)
    assert fingerprint == whole
    assert states == ["{'next': 14}"], "before the step, which is compared"


class Source(MicroBatches):
    """Two micro-batches of each global batch of a stream."""

    has_user_code = True

    def __init__(self, stream: Told) -> None:
        self.stream = stream
        self._reader = StreamReader(GivenData(stream, 4, list), seed=0)

    @property
    def reader(self) -> StreamReader:
        return self._reader

    def draw(self, step: int, index: int) -> Drawn:
        samples = self.reader.at(step).samples
        assert samples is not None
        seeding.seed(step)
        x = torch.stack([x for x, _ in samples[index::2]])
        return x + torch.rand(5), torch.zeros(len(x))


@pytest.mark.parametrize("kind", [Told, Talkative])
def test_a_helper_reads_a_stream_ahead_from_where_the_worker_is(
    kind: type[Told], tmp_path: Path
) -> None:
    """Until it dies; what is saved is the position of the step at hand."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def load() -> Source:
        gate.read_text()  # until the test writes
        return Source(kind())

    alone, source = Source(kind()), Source(kind())
    helper = HelperProcess.start(load, [])
    ahead = Prefetcher(source, helper, lambda: None, is_slow=True)
    for step in range(21):
        if step == 4:
            gate.write_text("go")
            assert helper.connection.poll(60)
        if step == 5:  # it was asked for what comes before the worker's step
            assert helper.connection.poll(60)
        if step == 14:
            os.kill(helper.pid, signal.SIGKILL)
            os.waitpid(helper.pid, 0)
        for index in (0, 1):
            drawn, expected = ahead.draw(step, index, (0, 2)), alone.draw(step, index)
            assert torch.equal(drawn[0], expected[0])
        at, other = source.reader.at(step), alone.reader.at(step)
        assert (at.position, at.size) == (other.position, other.size)
        assert at.sketch == other.sketch
        if step in (5, 13):
            assert source.stream.read == 20, "the helper reads"
    assert source.stream.read > 20


def test_an_endless_stream_is_not_read_ahead_of_its_bookmark() -> None:
    stream = Told(10_000)
    batches = read(GivenData(stream, 4, list), 0, 0)
    with seeding.kept():
        assert [batch.number for batch in islice(batches, 3)] == [0, 1, 2]
    assert stream.read == 12
