"""The table of what happened besides training, in sentences."""

from collections import defaultdict
from collections.abc import Sequence

from samestep.document.blocks import Block, Table
from samestep.document.formatting import is_number, percent, plural, seconds, setting
from samestep.output.schema import Event
from samestep.report.time_plots import on_one_clock


MOST_ROWS = 100


def events_table(events: Sequence[Event]) -> list[Block]:
    """Return a table of failures, restarts and the like, or nothing without any."""
    rows = [
        (seconds(at), event.event, _sentence(event))
        for at, event in on_one_clock(events)
        # `failed` at the end of a run has no fields: the one before says why.
        if event.event in _SENTENCES and (event.event != "failed" or event.get("error"))
    ]
    if not rows:
        return []
    caption = "Events"
    if len(rows) > MOST_ROWS:
        caption += f" (the first {MOST_ROWS} of {len(rows):,}; all in events.jsonl)"
    return [Table(caption, ("after", "event", "details"), rows[:MOST_ROWS], words=3)]


def _sentence(event: Event) -> str:
    fields = {name: setting(value) for name, value in (event.model_extra or {}).items()}
    gain, after, workers = (event.get(name) for name in ("gain", "after", "workers"))
    if is_number(gain):
        fields["gain"] = percent(gain, 0)
    if is_number(after):
        fields["after"] = seconds(after)
    if isinstance(workers, int):
        fields["workers"] = plural(workers, "worker")
    return _SENTENCES[event.event].format_map(defaultdict(lambda: "not set", fields))


_SENTENCES = {
    "caught up": "with step {step}, {after} after the failure",
    "checkpoint failed": "{error}",
    "evicted": "worker {worker} left after step {step}: it was too slow",
    "failed": "{error}",
    "fault": "{kind}",
    "hindered": "worker {worker} is so slow that a step would take {gain} less time "
    "without it",
    "interrupted": "the training was stopped",
    "no targets": "step {step}: all targets are ignored",
    "notice": "{text}",
    "rebalanced": "after step {step}: micro-batches {after} instead of {before}, to "
    "save {gain} of the time",
    "restart": "continues after step {step} with {workers}",
    "resumed": "with {workers}",
    "warning": "{text}",
}
