"""`samestep check`, on the command line."""

import sys

import click

from samestep.forking import ForkServer
from samestep.options import own_options


@click.command()
@click.argument("recipe", required=False)
@own_options
@click.option(
    "--set", "assignments", multiple=True, metavar="a.b=value", help="A recipe field."
)
def check(
    recipe: str | None,
    assignments: tuple[str, ...],
    model: str | None,
    data: str | None,
    loss: str | None,
) -> None:
    """Does RECIPE, with your own code in it, give the same bits at any placement?

    A few steps on a small part of the data at 1, 2 and 3 workers over both exchanges;
    says what breaks exactness. Exit code 0 if nothing does, else 1.

    \b
    Examples:
      samestep check --model mine:build --data mine:load
      samestep check mine.toml
    """
    with ForkServer() as server:
        from samestep import api
        from samestep.asking import recipe_of
        from samestep.recipe import parse_override

        named = {"model": model, "data": data, "loss": loss}
        overrides = dict(map(parse_override, assignments))
        verdict = api.check_exactness(
            recipe_of(recipe, named, overrides),
            model=model,
            data=data,
            loss=loss,
            server=server,
        )
        for trial in verdict.trials:
            click.echo(str(trial))
        for reason in verdict.reasons:
            click.echo(f"- {reason}")
        click.echo("exact" if verdict.is_exact else "not exact")
        sys.exit(0 if verdict.is_exact else 1)
