"""`samestep check`, on the command line."""

import sys
from typing import Any

import click

from samestep.cli.options import own_options, recipe_options
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system.terminal import echo


@click.command()
@click.argument("recipe", required=False)
@recipe_options
@own_options
@click.option(
    "--set", "assignments", multiple=True, metavar="a.b=value", help="A recipe field."
)
def check(recipe: str | None, **options: Any) -> None:
    """Does RECIPE, with your own code in it, give the same bits at any placement?

    Two short epochs at 1, 2 and 3 workers, over both exchanges, with ownership at
    random, and in a new process; says what breaks exactness. Exit code 0 if nothing
    does, else 1.

    \b
    Examples:
      samestep check --model mine:build --data mine:load
      samestep check mine.toml
    """
    with ForkServer() as server:
        from samestep.api import train
        from samestep.user_code.arguments import requested

        asked, parts = requested(recipe, options)
        verdict = train.check_exactness(asked, **parts, server=server)
        for outcome in verdict.outcomes:
            echo(str(outcome))
        for reason in verdict.reasons:
            echo(f"- {reason}")
        echo("exact" if verdict.is_exact else "not exact")
        sys.exit(0 if verdict.is_exact else 1)
