"""A trace of some steps of all workers, for Perfetto or chrome://tracing.

The format is Chrome's Trace Event Format, complete events ("X"); times in microseconds.
"""

from collections.abc import Mapping, Sequence

from samestep.messages.training import Span
from samestep.system.json_values import JsonObject


FILE = "trace.json"


def chrome(workers: Mapping[int, Sequence[Span]]) -> JsonObject:
    """Return the content of trace.json for the spans of each worker."""
    workers = _split_waiting(workers)
    starts = [span.start for spans in workers.values() for span in spans]
    zero = min(starts, default=0.0)
    names = [
        {
            "name": "thread_name",
            "ph": "M",
            "pid": 0,
            "tid": rank,
            "args": {"name": f"worker {rank}"},
        }
        for rank in sorted(workers)
    ]
    events = [
        {
            "name": span.phase,
            "ph": "X",
            "pid": 0,
            "tid": rank,
            "ts": (span.start - zero) * 1e6,
            "dur": span.seconds * 1e6,
            "args": {"step": span.step + 1},
        }
        for rank, spans in sorted(workers.items())
        for span in spans
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def _split_waiting(workers: Mapping[int, Sequence[Span]]) -> dict[int, list[Span]]:
    """Split each step's first exchange where its last worker arrives."""
    last: dict[int, float] = {}
    for spans in workers.values():
        for step, span in _arrivals(spans).items():
            last[step] = max(last.get(step, span.start), span.start)
    result: dict[int, list[Span]] = {}
    for rank, spans in workers.items():
        first = _arrivals(spans)
        result[rank] = []
        for span in spans:
            is_first = span is first.get(span.step)
            result[rank] += _split(span, last[span.step]) if is_first else [span]
    return result


def _arrivals(spans: Sequence[Span]) -> dict[int, Span]:
    """Return the first exchange of each step."""
    return {s.step: s for s in reversed(spans) if s.phase == "exchange"}


def _split(span: Span, last: float) -> list[Span]:
    wait = min(last - span.start, span.seconds)
    if wait <= 0:
        return [span]
    return [
        Span(span.step, "wait", span.start, wait),
        Span(span.step, span.phase, span.start + wait, span.seconds - wait),
    ]
