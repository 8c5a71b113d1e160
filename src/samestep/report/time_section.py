"""The part of a run's report on where the time went."""

from collections.abc import Mapping
from typing import Any

from samestep.document.blocks import Block, Section, Table, Text, together
from samestep.document.formatting import is_number, percent, plural, seconds, size
from samestep.output.schema import Epoch
from samestep.report import learning_plots, time_plots
from samestep.report.event_table import events_table
from samestep.report.load import RunFiles


def time_section(run: RunFiles) -> Section:
    """Figures, the table of workers, what happened, and what balancing did."""
    epochs = run.result.epochs
    workers = time_plots.by_worker(epochs)
    waited = _waited_for(epochs, len(workers))
    blocks = together(
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
    talk = _talk(epochs)
    if talk:
        blocks.append(Text(talk))
    blocks += events_table(run.events)
    blocks += _balance(run.result.balance)
    return Section("Where the time went", "time", blocks)


def _worker_table(workers: list[dict[str, float]], waited: list[float]) -> Table:
    names = list(dict.fromkeys(name for worker in workers for name in worker))
    rows = []
    for rank, phases in enumerate(workers):
        spent = sum(phases.values())
        row = [str(rank), seconds(spent)]
        row += [
            percent(phases.get(name, 0.0) / spent if spent else None) for name in names
        ]
        rows.append((*row, *([seconds(waited[rank])] if waited else [])))
    columns = ("worker", "time", *names, *(["others waited"] if waited else []))
    return Table("Workers, all epochs together", columns, rows)


def _waited_for(epochs: list[Epoch], ranks: int) -> list[float]:
    """Seconds of each rank; empty where nothing is known or nobody can wait."""
    known = [epoch.waited_for for epoch in epochs if epoch.waited_for]
    if not known or ranks < 2:
        return []
    return [sum(one[rank] for one in known if rank < len(one)) for rank in range(ranks)]


def _talk(epochs: list[Epoch]) -> str:
    """One paragraph on exchange; empty where nothing is known."""
    told = [epoch for epoch in epochs if epoch.communication_share is not None]
    if not told:
        return ""
    last = told[-1]
    moved = sum(epoch.bytes_exchanged or 0 for epoch in told)
    sent = sum(epoch.network_bytes or 0 for epoch in told)
    between = f", {size(sent)} of them between machines" if sent else ""
    return (
        f"In the last epoch, exchange and wait took "
        f"{percent(last.communication_share)} of the workers' time, wait alone "
        f"{percent(last.straggler_share)}. In {plural(len(told), 'epoch')}, all "
        f"workers together exchanged {size(moved)}{between}."
    )


def _balance(found: Mapping[str, Any]) -> list[Block]:
    """Who was slower than the fastest for a second or longer; nothing if nobody was."""
    lags = found.get("lag")
    told = [
        (str(rank), seconds(lag["seconds"]), percent(lag["speed"], 0))
        for rank, lag in (lags.items() if isinstance(lags, Mapping) else ())
        if isinstance(lag, Mapping)
        and is_number(lag.get("seconds"))
        and is_number(lag.get("speed"))
        and lag["seconds"] >= 1
    ]
    if not told:
        return []
    columns = ("worker", "slower than the fastest for", "at this share of its speed")
    blocks: list[Block] = [Table("Uneven workers", columns, told)]
    if is_number(found.get("saved")) and found["saved"] > 0.01:
        blocks.append(Text(f"Balancing saved {percent(found['saved'])} of the time."))
    return blocks
