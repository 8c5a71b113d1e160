"""The points of a study: each is measured in every round, in random order."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.errors import PlacementError, RecipeError
from samestep.scaling import units


ROUNDS, SECONDS = 10, 1.0
MEASURING = ("workers", "global_batches", "weak", "exchange", "seconds_per_run")
"""The settings that change what is measured; an unfinished study must have the same."""

Kind = Literal["strong", "weak", "limit", "calibration"]
Count = Annotated[int, Field(ge=1)]


class Point(NamedTuple):
    """What one measurement runs.

    strong: one training. weak: one that grows with its workers. limit: as many
    independent trainings of 1 worker, without any exchange. calibration: 1 worker with
    smaller micro-batches, which separates their fixed cost from that of their samples.
    """

    kind: Kind
    workers: int
    global_batch: int
    """The samples of one training's step."""
    micro_batches: int

    @property
    def trainings(self) -> int:
        """How many run at the same time."""
        return self.workers if self.kind == "limit" else 1


class Settings(BaseModel):
    """The settings of a study, with `auto` resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: tuple[Count, ...]
    global_batches: tuple[Count, ...]
    weak: bool = False
    exchange: str
    rounds: Count = ROUNDS
    seconds_per_run: Annotated[float, Field(gt=0)] = SECONDS
    nodes_up_to: Annotated[int, Field(ge=2)] | None = None
    bandwidth_bytes_per_second: Annotated[float, Field(gt=0)] | None = None
    latency_seconds: Annotated[float, Field(gt=0)] | None = None


def from_options(
    recipe: Recipe,
    cores: int,
    *,
    workers: str | None = None,
    global_batch: str | None = None,
    weak: bool = False,
    exchange: str = "auto",
    nodes_up_to: int | None = None,
    bandwidth: str | None = None,
    latency: str | None = None,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> Settings:
    """Return checked settings from options. Raises PlacementError or RecipeError."""
    counts = default_workers(cores, recipe.micro_batches)
    if workers is not None:
        counts = parse_counts(workers, "workers")
    batches: tuple[int, ...] = (recipe.global_batch,)
    if global_batch is not None:
        batches = parse_counts(global_batch, "global-batch")
    asked = Placement.model_validate({"workers": 1, "exchange": exchange})
    settings = Settings(
        workers=counts,
        global_batches=batches,
        weak=weak,
        exchange=asked.resolve(None)[0].exchange,
        rounds=rounds,
        seconds_per_run=seconds,
        nodes_up_to=nodes_up_to,
        bandwidth_bytes_per_second=units.bandwidth(bandwidth) if bandwidth else None,
        latency_seconds=units.latency(latency) if latency else None,
    )
    check(settings, recipe)
    return settings


def parse_counts(text: str, what: str) -> tuple[int, ...]:
    """Return (1, 2, 4) for `1,2,4`. Raises PlacementError unless they increase."""
    parts = [part.strip() for part in text.split(",")]
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    increasing = all(a < b for a, b in pairwise(numbers))
    if len(numbers) < len(parts) or 0 in numbers or not increasing:
        raise PlacementError(
            f"`--{what}` is a list of increasing positive numbers, such as `1,2,4`; "
            f"received `{text}`."
        )
    return numbers


def default_workers(cores: int, micro_batches: int) -> tuple[int, ...]:
    """Return 1, 2, 3, 4, 6, 8, 12, 16 ... up to what machine and recipe allow."""
    most = min(cores, micro_batches)
    steps = {1, most} | {k << n for k in (2, 3) for n in range(most.bit_length())}
    return tuple(sorted(count for count in steps if count <= most))


def check(settings: Settings, recipe: Recipe) -> None:
    """Raise PlacementError or RecipeError for settings that cannot be measured."""
    most = recipe.micro_batches
    if settings.workers[-1] > most:
        raise PlacementError(
            f"{settings.workers[-1]} workers cannot share {most} micro-batches: each "
            f"worker computes at least one. Measure at most {most}, or use "
            f"`--set micro_batches={settings.workers[-1]}` (another recipe and result)."
        )
    if settings.global_batches[0] < most:
        raise RecipeError(
            f"A micro-batch holds at least one sample: `micro_batches` is {most}, the "
            f"smallest global batch only {settings.global_batches[0]}."
        )
    network = settings.bandwidth_bytes_per_second, settings.latency_seconds
    if settings.nodes_up_to and None in network:
        raise PlacementError(
            "A prediction for several nodes needs their network: add `--bandwidth` and "
            "`--latency`, such as `--bandwidth 10Gbit --latency 50us`."
        )
    if not settings.nodes_up_to and network != (None, None):
        raise PlacementError(
            "`--bandwidth` and `--latency` describe a network between nodes: add their "
            "number, such as `--nodes-up-to 64`."
        )


def grid(settings: Settings, micro_batches: int) -> list[Point]:
    """Return all points, in the order of the table."""
    points = []
    for batch in settings.global_batches:
        for workers in settings.workers:
            points.append(Point("strong", workers, batch, micro_batches))
        if 2 * micro_batches <= batch and settings.workers[0] == 1:
            points.append(Point("calibration", 1, batch, 2 * micro_batches))
        for workers in settings.workers:
            if workers > 1:
                points.append(Point("limit", workers, batch, micro_batches))
    if settings.weak:
        batch = settings.global_batches[0]
        for n in settings.workers:
            points.append(Point("weak", n, n * batch, n * micro_batches))
    return points


def schedule(points: list[Point], rounds: int) -> Iterator[tuple[int, Point]]:
    """Yield (round from 1, point): every round has every point once, in its own order.

    A machine's speed drifts; measured in blocks, the drift would look like scaling.
    """
    for round_ in range(1, rounds + 1):
        order = random.Random(round_)  # noqa: S311  not a secret
        yield from ((round_, point) for point in order.sample(points, len(points)))
