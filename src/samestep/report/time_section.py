"""The section of a run's report on where the time went."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from samestep.document import formatting as fmt
from samestep.document.blocks import Block, Section, Table, Text, side_by_side
from samestep.output.schema import Epoch, Event, Phases
from samestep.report import learning_plots, time_plots
from samestep.report.load import RunFiles


MAX_EVENTS = 100
SENTENCES = {
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
"""Kind of event -> its details, from its fields."""


def time_section(run: RunFiles) -> Section:
    """Return figures, the table of workers, the events, and the effect of balancing."""
    epochs = run.result.epochs
    workers = time_plots.by_worker(epochs)
    waited = _waited_for(epochs, len(workers))
    blocks = side_by_side(
        [
            time_plots.epoch_plot(epochs),
            time_plots.worker_plot(workers),
            time_plots.waiting_plot(waited),
            learning_plots.share_plot(run.steps),
            time_plots.time_line(run.events),
        ]
    )
    if workers:
        blocks.append(_worker_table(workers, waited))
    blocks += _communication(epochs)
    blocks += _events(run.events)
    blocks += _balance(run.result.balance)
    return Section("Where the time went", "time", blocks)


def _worker_table(workers: list[Phases], waited: list[float]) -> Table:
    names = list(dict.fromkeys(name for worker in workers for name in worker))
    rows = []
    for rank, phases in enumerate(workers):
        spent = sum(phases.values())
        shares = [phases.get(name, 0.0) / spent if spent else None for name in names]
        others_waited = [fmt.seconds(waited[rank])] if waited else []
        shown = map(fmt.percent, shares)
        rows.append((str(rank), fmt.seconds(spent), *shown, *others_waited))
    columns = ("worker", "time", *names, *(["others waited"] if waited else []))
    return Table("Workers, all epochs together", columns, rows)


def _waited_for(epochs: list[Epoch], ranks: int) -> list[float]:
    """Return seconds of each rank; nothing if they are unknown or there is one rank."""
    known = [epoch.waited_for for epoch in epochs if epoch.waited_for]
    if not known or ranks < 2:
        return []
    return [sum(one[rank] for one in known if rank < len(one)) for rank in range(ranks)]


def _communication(epochs: list[Epoch]) -> list[Block]:
    """Return a paragraph on the exchange, or nothing if no epoch measured it."""
    known = [epoch for epoch in epochs if epoch.communication_share is not None]
    if not known:
        return []
    text = (
        f"In the last epoch, exchange and wait took "
        f"{fmt.percent(known[-1].communication_share)} of the workers' time"
    )
    if known[-1].straggler_share is not None:
        text += f", wait alone {fmt.percent(known[-1].straggler_share)}"
    received = sum(epoch.bytes_exchanged or 0 for epoch in known)
    sent = sum(epoch.network_bytes or 0 for epoch in known)
    between = f", {fmt.size(sent)} of them between machines" if sent else ""
    if received:
        epochs_ = fmt.plural(len(known), "epoch")
        text += (
            f". In {epochs_}, all workers together exchanged "
            f"{fmt.size(received)}{between}"
        )
    return [Text(f"{text}.")]


def _events(events: Sequence[Event]) -> list[Block]:
    """Return a table of failures, restarts and the like, or nothing without any."""
    rows = [
        (fmt.seconds(at), event.event, _sentence(event))
        for at, event in time_plots.on_one_clock(events)
        # `failed` at the end of a run has no fields: the one before says why.
        if event.event in SENTENCES and (event.event != "failed" or event.get("error"))
    ]
    if not rows:
        return []
    caption = "Events"
    if len(rows) > MAX_EVENTS:
        caption += f" (the first {MAX_EVENTS} of {len(rows):,}; all in events.jsonl)"
    return [Table(caption, ("after", "event", "details"), rows[:MAX_EVENTS], words=3)]


def _sentence(event: Event) -> str:
    fields = {
        name: fmt.setting(value) for name, value in (event.model_extra or {}).items()
    }
    gain, after, workers = (event.get(name) for name in ("gain", "after", "workers"))
    if fmt.is_number(gain):
        fields["gain"] = fmt.percent(gain, 0)
    if fmt.is_number(after):
        fields["after"] = fmt.seconds(after)
    if isinstance(workers, int):
        fields["workers"] = fmt.plural(workers, "worker")
    return SENTENCES[event.event].format_map(defaultdict(lambda: "not set", fields))


def _balance(balance: Mapping[str, Any]) -> list[Block]:
    """List the workers that were slower than the fastest for a second or longer."""
    lags = balance.get("lag")
    rows = [
        (str(rank), fmt.seconds(lag["seconds"]), fmt.percent(lag["speed"], 0))
        for rank, lag in (lags.items() if isinstance(lags, Mapping) else ())
        if isinstance(lag, Mapping)
        and fmt.is_number(lag.get("seconds"))
        and fmt.is_number(lag.get("speed"))
        and lag["seconds"] >= 1
    ]
    if not rows:
        return []
    columns = ("worker", "slower than the fastest for", "at this share of its speed")
    blocks: list[Block] = [Table("Uneven workers", columns, rows)]
    saved = balance.get("saved")
    if fmt.is_number(saved) and saved > 0.01:
        blocks.append(Text(f"Balancing saved {fmt.percent(saved)} of the time."))
    return blocks
