"""The command `samestep audit`; imports little until it runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from samestep.cli.options import (
    device_option,
    exchange_option,
    training_code_options,
    workers_option,
)
from samestep.system.terminal import echo_row


if TYPE_CHECKING:
    from samestep.api.audit import Audit

SHARES = 0.01, 0.1, 0.3
"""Shares of false steps for which the probability is shown."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@workers_option
@device_option
@exchange_option
@click.option(
    "--segments",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Parts between checkpoints to compute again, chosen at random.",
)
@click.option("--full", is_flag=True, help="Compute all steps again.")
@click.option("--seed", type=int, help="Seed of the choice; default: a random one.")
@training_code_options
def audit(
    run: Path,
    workers: int | str,
    device: str,
    exchange: str,
    segments: int,
    full: bool,
    seed: int | None,
    **parts: Any,
) -> None:
    """Compute steps of RUN again and compare them with its ledger.

    Exit code 1 if a step, a checkpoint or the final weights differ. Any number of
    workers will do; RUN is only read.

    \b
    Examples:
      samestep audit runs/mine
      samestep audit runs/mine --segments 5 --seed 7 --workers 4
      samestep audit runs/mine --full
    """
    from samestep.supervisor.forkserver_client import ForkServer

    with ForkServer() as server:
        from samestep.api import audit
        from samestep.config.placement import Placement

        placed = {"workers": workers, "device": device, "exchange": exchange}
        found = audit.audit(
            run,
            Placement.model_validate(placed),
            segments=segments,
            full=full,
            seed=seed,
            server=server,
            **parts,
        )
    _show(found)
    sys.exit(1 if found.mismatch else 0)


def _show(found: "Audit") -> None:
    for first, end in found.computed:
        echo_row("steps", f"{first + 1} to {end}: the same")
    if found.mismatch:
        echo_row("mismatch", found.mismatch)
        return
    share = found.checked / found.steps
    echo_row(
        "checked",
        f"{found.checked} of {found.steps} steps ({share:.0%}), "
        f"{len(found.computed)} of {len(found.segments)} segments, "
        f"in {found.seconds:.1f} s, seed {found.seed}",
    )
    if share < 1:
        known = [f"{q:.0%}: {found.probability(q):.0%}" for q in SHARES]
        echo_row("power", f"found, if this share of steps is false: {', '.join(known)}")
    echo_row("result", "no difference")
