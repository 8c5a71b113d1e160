"""The command `samestep check`; imports little until it runs."""

import sys
from typing import Any

import click

from samestep.cli.options import recipe_options, set_option, training_code_options
from samestep.system.terminal import echo


@click.command()
@click.argument("recipe", required=False)
@recipe_options
@training_code_options
@set_option
def check(recipe: str | None, **options: Any) -> None:
    """Check that RECIPE, with your own code, gives the same bits at any placement.

    Trains two short epochs at 1, 2 and 3 workers, over both exchanges, with random
    ownership of micro-batches, and in a new process; prints what breaks exactness. Exit
    code 0 if nothing does, else 1.

    \b
    Examples:
      samestep check --model mine:build --data mine:load
      samestep check mine.toml
    """
    from samestep.supervisor.forkserver_client import ForkServer

    with ForkServer() as server:
        from samestep.api.check import check_exactness
        from samestep.user_code.arguments import requested

        asked, parts = requested(recipe, options)
        verdict = check_exactness(asked, **parts, server=server)
        for outcome in verdict.outcomes:
            echo(str(outcome))
        for reason in verdict.reasons:
            echo(f"- {reason}")
        echo("exact" if verdict.is_exact else "not exact")
        sys.exit(0 if verdict.is_exact else 1)
