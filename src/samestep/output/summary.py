"""The summary of a finished run that the command line prints."""

import math
from collections.abc import Mapping
from typing import Any

from samestep.config import published
from samestep.output.run import RunResult
from samestep.output.sentences import scores


def summary(run: RunResult) -> str:
    """Return scores, times, gains by balancing, the fingerprint and the directory."""
    result, last = run.result, run.history[-1]
    lines = [
        f"{split:<12}{scores(record, f'{split}_', '  ')}"
        for split, record in (("test", result), ("validation", last), ("train", last))
        if f"{split}_loss" in record
    ]
    lines[1:1] = _text_line(run)
    if "best_epoch" in result:
        lines.append(
            f"stopping    after epoch {last['epoch']}; epoch {result['best_epoch']} "
            "was the best"
        )
    lines += _balance_lines(result.get("balance") or {})
    lines += [
        f"time        {result['train_seconds']:.2f} s training, "
        f"{result['wall_seconds']:.2f} s in all",
        f"weights     sha256 {run.weights_sha256}{_beside_published(run)}",
        f"run         {run.path}",
    ]
    return "\n".join(lines)


def _beside_published(run: RunResult) -> str:
    """Say whether a built-in recipe has given the weights that it gives anywhere."""
    found = published.fingerprint(run.recipe, run.result.get("arithmetic", "torch"))
    if found is None:
        return ""
    name, expected = found
    if run.weights_sha256 == expected:
        return ", as published"
    return (
        f"\n            not as published: {name} gives {expected} on every processor; "
        "please report this"
    )


def _text_line(run: RunResult) -> list[str]:
    """Compare a model of text with simple methods, in bits per character."""
    baselines = run.result.get("baselines")
    if baselines is None:
        return []
    bits = run.result["test_loss"] / math.log(2)
    others = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
    return [f"test        {bits:.3f} bits per character ({others})"]


def _balance_lines(balance: Mapping[str, Any]) -> list[str]:
    """Say what balancing gained, if some worker was slow for a second or more."""
    lines = []
    for rank, lag in balance.get("lag", {}).items():
        if lag["seconds"] >= 1:
            lines.append(
                f"balance     worker {rank} ran at {lag['speed']:.2f} of the fastest's "
                f"speed for {lag['seconds']:.0f} s"
            )
    if lines and balance["saved"] > 0.01:
        lines.append(f"            balancing saved {balance['saved']:.0%} of the time")
    if lines and "enough_micro_batches" in balance:
        lines.append(
            "            too few micro-batches for this: "
            f"{balance['efficiency']:.0%} of the possible speed; "
            f"{balance['enough_micro_batches']} would do (and give another result)"
        )
    return lines
