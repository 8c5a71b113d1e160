"""What happened besides training, in sentences."""

from collections.abc import Callable, Sequence

from samestep.document.blocks import Block, Table
from samestep.document.formatting import is_number, percent, plural, seconds, setting
from samestep.output.schema import Event
from samestep.report.time_plots import on_one_clock


MOST_ROWS = 100


def events_table(events: Sequence[Event]) -> list[Block]:
    """Failures, restarts, rebalancings and the like; nothing if there were none."""
    told = [
        (seconds(at), event.event, _SENTENCES[event.event](event))
        for at, event in on_one_clock(events)
        if event.event in _SENTENCES
    ]
    if not told:
        return []
    caption = "What happened on the way"
    if len(told) > MOST_ROWS:
        caption += f" (the first {MOST_ROWS} of {len(told):,}; all in events.jsonl)"
    return [Table(caption, ("after", "what", "details"), told[:MOST_ROWS], words=3)]


def _said(name: str) -> Callable[[Event], str]:
    return lambda event: setting(event.get(name))


def _restart(event: Event) -> str:
    workers = event.get("workers")
    with_ = plural(workers, "worker") if isinstance(workers, int) else setting(workers)
    return f"going on after step {setting(event.get('step'))} with {with_}"


def _rebalanced(event: Event) -> str:
    before, after = setting(event.get("before")), setting(event.get("after"))
    return (
        f"after step {setting(event.get('step'))}: micro-batches {after} "
        f"instead of {before}, to save {_gain(event)} of the time"
    )


def _caught_up(event: Event) -> str:
    after = event.get("after")
    lost = seconds(after) if isinstance(after, (int, float)) else setting(after)
    return f"with step {setting(event.get('step'))}, {lost} after the failure"


def _hindered(event: Event) -> str:
    return (
        f"worker {setting(event.get('worker'))} is so slow that a step would take "
        f"{_gain(event)} less time without it"
    )


def _gain(event: Event) -> str:
    gain = event.get("gain")
    return percent(gain, 0) if is_number(gain) else setting(gain)


def _evicted(event: Event) -> str:
    worker, step = setting(event.get("worker")), setting(event.get("step"))
    return f"worker {worker} left after step {step}: it was too slow"


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "caught up": _caught_up,
    "checkpoint failed": _said("error"),
    "evicted": _evicted,
    "failed": _said("error"),
    "fault": _said("kind"),
    "hindered": _hindered,
    "interrupted": lambda _: "the training was stopped",
    "no targets": lambda event: (
        f"step {setting(event.get('step'))}: all targets are ignored"
    ),
    "notice": _said("text"),
    "rebalanced": _rebalanced,
    "restart": _restart,
    "warning": _said("text"),
    "resumed": lambda event: f"with {setting(event.get('workers'))} workers",
}
