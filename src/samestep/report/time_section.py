"""The section of a run's report on where the time went."""

from collections.abc import Mapping
from typing import Any

from samestep.document.blocks import Block, Section, Table, Text, side_by_side
from samestep.document.formatting import is_number, percent, plural, seconds, size
from samestep.output.schema import Epoch
from samestep.report import learning_plots, time_plots
from samestep.report.event_table import events_table
from samestep.report.load import RunFiles


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
    blocks += events_table(run.events)
    blocks += _balance(run.result.balance)
    return Section("Where the time went", "time", blocks)


def _worker_table(workers: list[dict[str, float]], waited: list[float]) -> Table:
    names = list(dict.fromkeys(name for worker in workers for name in worker))
    columns = ["worker", "time", *names]
    rows = []
    for rank, phases in enumerate(workers):
        spent = sum(phases.values())
        shares = [phases.get(name, 0.0) / spent if spent else None for name in names]
        rows.append([str(rank), seconds(spent), *map(percent, shares)])
    if waited:
        columns.append("others waited")
        for row, duration in zip(rows, waited, strict=True):
            row.append(seconds(duration))
    return Table("Workers, all epochs together", tuple(columns), [*map(tuple, rows)])


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
    received = sum(epoch.bytes_exchanged or 0 for epoch in known)
    sent = sum(epoch.network_bytes or 0 for epoch in known)
    between = f", {size(sent)} of them between machines" if sent else ""
    text = (
        f"In the last epoch, exchange and wait took "
        f"{percent(known[-1].communication_share)} of the workers' time, wait alone "
        f"{percent(known[-1].straggler_share)}. In {plural(len(known), 'epoch')}, all "
        f"workers together exchanged {size(received)}{between}."
    )
    return [Text(text)]


def _balance(balance: Mapping[str, Any]) -> list[Block]:
    """List the workers that were slower than the fastest for a second or longer."""
    lags = balance.get("lag")
    rows = [
        (str(rank), seconds(lag["seconds"]), percent(lag["speed"], 0))
        for rank, lag in (lags.items() if isinstance(lags, Mapping) else ())
        if isinstance(lag, Mapping)
        and is_number(lag.get("seconds"))
        and is_number(lag.get("speed"))
        and lag["seconds"] >= 1
    ]
    if not rows:
        return []
    columns = ("worker", "slower than the fastest for", "at this share of its speed")
    blocks: list[Block] = [Table("Uneven workers", columns, rows)]
    saved = balance.get("saved")
    if is_number(saved) and saved > 0.01:
        blocks.append(Text(f"Balancing saved {percent(saved)} of the time."))
    return blocks
