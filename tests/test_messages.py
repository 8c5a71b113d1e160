"""Messages between processes: one line of JSON each, and back again."""

import json
import math
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samestep.errors import WorkerFailed
from samestep.messages import wire
from samestep.messages.job import Job, Setup
from samestep.messages.processes import Answer, Exited, Request
from samestep.messages.training import (
    EpochRecord,
    Message,
    Span,
    StepRecord,
    Stopped,
    TimeUse,
    Traced,
)
from samestep.supervisor.launch import Worker
from samestep.system.json_values import JsonObject


UNIONS = (Message, Job, Request, Answer)
KINDS = [kind for union in UNIONS for kind in get_args(union)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=3)


def strategy_for(kind: type) -> st.SearchStrategy[Any]:
    """Any message of one class; `JsonObject` is a dictionary of anything."""
    values = {f.name: OBJECTS if f.type == JsonObject else ... for f in fields(kind)}
    return st.builds(kind, **values)


st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(Setup, strategy_for(Setup))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_message_arrives_as_it_was_sent(kind: type, data: Any) -> None:
    message = data.draw(strategy_for(kind))
    line = wire.encode(message)
    assert line.count(b"\n") == 1
    (union,) = [union for union in UNIONS if kind in get_args(union)]
    assert wire.decode(line, union) == message


def test_spans_arrive_as_spans() -> None:
    message = Traced(worker=1, spans=[Span(3, "forward", 0.5, 0.25)])
    (span,) = wire.decode(wire.encode(message), Message).spans
    assert isinstance(span, Span)


def test_numbers_that_are_not_finite_arrive() -> None:
    times = TimeUse(
        workers=[{"data": math.inf}],
        waited_for=[],
        communication_share=0.0,
        straggler_share=0.0,
        bytes_exchanged=0,
        network_bytes=0,
    )
    record = StepRecord(
        epoch=1,
        step=1,
        metrics={"loss": math.nan},
        lr=0.1,
        samples_per_second=-math.inf,
        times=times,
        noise_scale=None,
        speeds=[],
        shares=[],
    )
    received = wire.decode(wire.encode(record), Message)
    assert repr(received) == repr(record)


def test_a_whole_number_stays_one() -> None:
    """Or what is written to metrics.jsonl would depend on the way it took."""
    line = b'{"type": "Stopped", "step": 7}\n'
    assert wire.encode(wire.decode(line, Message)) == line


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\n",
        b"7\n",
        b"[]\n",
        b"{}\n",
        b'{"type": "Stopped", "st\n',
        b'{"type": "Stopped"}\n',
        b'{"type": "Stopped", "step": 1, "steps": 2}\n',
        b'{"type": "Unknown", "step": 1}\n',
        b'{"type": ["Stopped"], "step": 1}\n',
        b'{"type": "Exited", "pid": 1, "code": 0}\n',
        b'{"type": "StepRecord", "times": 3}\n',
    ],
)
def test_a_line_that_is_no_message_is_an_error_that_shows_it(line: bytes) -> None:
    with pytest.raises(WorkerFailed, match="Do they run the same version") as caught:
        wire.decode(line, Message)
    assert repr(line)[:60] in str(caught.value)


def test_a_message_of_one_channel_is_unknown_on_another() -> None:
    line = wire.encode(Exited(pid=1, code=0))
    assert wire.decode(line, Answer) == Exited(pid=1, code=0)
    with pytest.raises(WorkerFailed):
        wire.decode(line, Request)


def test_a_record_has_open_fields_beside_the_others_and_no_empty_ones() -> None:
    times = TimeUse(
        workers=[],
        waited_for=[0.5],
        communication_share=0.25,
        straggler_share=0.125,
        bytes_exchanged=8,
        network_bytes=0,
    )
    record = EpochRecord(
        epoch=1,
        step=7,
        seconds=2.0,
        train_metrics={"train_loss": 0.5, "train_f1": 0.75},
        samples_per_second=100.0,
        seconds_by_phase={"data": 1.0},
        times=times,
        noise_scale=None,
        own_metrics=["f1"],
        validation_metrics={"validation_loss": 0.25},
        weights_sha256="00",
    )
    assert list(wire.as_record(record).items()) == [
        ("epoch", 1),
        ("step", 7),
        ("seconds", 2.0),
        ("train_loss", 0.5),
        ("train_f1", 0.75),
        ("samples_per_second", 100.0),
        ("seconds_by_phase", {"data": 1.0}),
        ("workers", []),
        ("waited_for", [0.5]),
        ("communication_share", 0.25),
        ("straggler_share", 0.125),
        ("bytes_exchanged", 8),
        ("network_bytes", 0),
        ("noise_scale", None),
        ("own_metrics", ["f1"]),
        ("minor_faults_per_step", 0.0),
        ("validation_loss", 0.25),
        ("weights_sha256", "00"),
    ]
    assert "own_metrics" not in wire.as_record(
        EpochRecord(**{**vars(record), "own_metrics": None})
    )


@contextmanager
def worker_and_socket() -> Iterator[tuple[Worker, socket.socket]]:
    """The supervisor's view of a worker, and the worker's end of the socket."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield Worker(0, 1, ours, Path("log")), theirs


def test_the_supervisor_puts_lines_together_from_their_parts() -> None:
    messages = [Stopped(step=1), Stopped(step=2)]
    lines = b"".join(map(wire.encode, messages))
    with worker_and_socket() as (worker, theirs):
        theirs.sendall(lines[:50])
        assert worker.receive() == messages[:1]
        assert worker.receive() == []
        theirs.sendall(lines[50:])
        assert worker.receive() == messages[1:]
        assert not worker.is_closed
        theirs.close()
        assert worker.receive() == []
        assert worker.is_closed


def test_a_worker_that_sends_no_message_has_failed() -> None:
    with worker_and_socket() as (worker, theirs):
        theirs.sendall(b"printed by user code\n")
        with pytest.raises(WorkerFailed, match="received b'printed by user code'"):
            worker.receive()


def test_names_of_messages_are_unique() -> None:
    """A name identifies a class on the wire."""
    names = [kind.__name__ for kind in KINDS]
    assert len(names) == len(set(names))
    assert json.loads(wire.encode(Stopped(step=1)))["type"] == "Stopped"


def test_messages_need_no_torch() -> None:
    code = (
        "import sys; import samestep.messages.training, samestep.messages.processes; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
