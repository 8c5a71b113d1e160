"""The data that a page carries, so that its numbers can be computed again."""

import math
from typing import Any

from samestep.output.schema import measured
from samestep.report.load import RunFiles


MOST_STEPS = 2_000
"""A page stays small: of longer trainings, every n-th recorded step."""
STEP_FIELDS = (
    "epoch",
    "step",
    "loss",
    "lr",
    "samples_per_second",
    "communication_share",
    "straggler_share",
    "noise_scale",
    "at",
)


def plain_data(run: RunFiles) -> dict[str, Any]:
    """The result, the events, the machine, and the steps column by column."""
    stride = math.ceil(len(run.steps) / MOST_STEPS) or 1
    kept = run.steps[::stride]
    steps = {name: [getattr(step, name) for step in kept] for name in STEP_FIELDS}
    for name in run.result.metrics:
        steps[name] = [measured(step, name) for step in kept]
    return {
        "result": plain(run.result.model_dump(exclude_unset=True)),
        "every_nth_step": stride,
        "steps": plain(steps),
        "events": plain([event.model_dump() for event in run.events]),
        "environment": plain(run.environment),
    }


def plain(value: Any) -> Any:
    """As JSON allows it: numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
