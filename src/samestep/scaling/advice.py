"""Plain sentences with numbers. Pure: from the fields of scaling.json."""

from typing import Any

from samestep.scaling.grid import Settings
from samestep.scaling.predict import relative_samples


Fields = dict[str, Any]

WORTH = 0.05
"""A gain below this is not worth another worker or node."""
ORDINALS = {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth"}


def advise(
    found: Fields, micro_batches: int, settings: Settings, cores: int
) -> list[str]:
    """What was measured and what to do about it, most important first."""
    sentences = _speedups(found, settings)
    sentences += _one_more(found, micro_batches, settings, cores)
    sentences += _batches(found, settings)
    sentences += _nodes(found, micro_batches, settings)
    sentences += _honesty(found)
    return sentences


def _strong(found: Fields, batch: int) -> list[Fields]:
    return [
        point
        for point in found["points"]
        if point["kind"] == "strong" and point["global_batch"] == batch
    ]


def _speedups(found: Fields, settings: Settings) -> list[str]:
    sentences = []
    for point in _strong(found, settings.global_batches[0]):
        if point["workers"] == 1 or point["speedup"] is None:
            continue
        text = (
            f"{point['workers']} workers: {point['speedup']:.2f}x "
            f"({point['speedup_low']:.2f} to {point['speedup_high']:.2f})"
        )
        if limit := point["limit_speedup"]:
            share = point["efficiency_of_limit"]
            text += (
                f", {share:.0%} of what {point['workers']} trainings that never talk "
                f"reach on this machine ({limit:.2f}x)"
            )
        sentences.append(f"{text}.")
    last = _strong(found, settings.global_batches[0])[-1]
    if last["workers"] > 1:
        sentences.append(_where_time_goes(last))
    return sentences


def _where_time_goes(point: Fields) -> str:
    phases = point["seconds_by_phase"]
    total, milliseconds = sum(phases.values()) or 1.0, point["step_seconds"] * 1e3
    exchange, wait = phases.get("exchange", 0.0), phases.get("wait", 0.0)
    return (
        f"With {point['workers']} workers a step takes {milliseconds:.2f} ms, "
        f"of which {exchange / total:.0%} is exchange and {wait / total:.0%} is "
        "waiting for the slowest worker."
    )


def _one_more(
    found: Fields, micro_batches: int, settings: Settings, cores: int
) -> list[str]:
    batch, most = settings.global_batches[0], settings.workers[-1]
    measured = _strong(found, batch)
    if most >= micro_batches:
        text = (
            f"More than {micro_batches} workers need more micro-batches, such as "
            f"`--set micro_batches={2 * micro_batches}` (another recipe and result)."
        )
        return [text, *_best_measured(measured)]
    rates = {
        line["workers"]: line["samples_per_second"]
        for line in found["predictions"]
        if line["where"] == "machine" and line["global_batch"] == batch
    }
    if most + 1 not in rates:
        return _best_measured(measured)
    gain = rates[most + 1] / rates[most] - 1
    name = ORDINALS.get(most + 1, f"{most + 1}th")
    article = "An" if name[0] in "e8" else "A"
    why = f": this machine has {cores} cores" if most >= cores else ""
    if -0.005 < gain < 0.005:
        text = f"{article} {name} would gain nothing{why}."
    elif gain > 0:
        text = f"{article} {name} would gain {gain:.0%}{why}."
    else:
        text = f"{article} {name} would lose {-gain:.0%}{why}."
    return [text, *_best_measured(measured)]


def _best_measured(measured: list[Fields]) -> list[str]:
    if len(measured) < 2:
        return []
    best = max(measured, key=lambda point: float(point["samples_per_second"]))
    last = measured[-1]
    if best is last:
        return []
    return [
        f"Fastest of what was measured: {_many(best['workers'], 'worker')}; "
        f"{last['workers']} are slower."
    ]


def _batches(found: Fields, settings: Settings) -> list[str]:
    first, *others = settings.global_batches
    most, noise = settings.workers[-1], found["noise"]
    speedups = {
        batch: next(
            (p["speedup"] for p in _strong(found, batch) if p["workers"] == most), None
        )
        for batch in settings.global_batches
    }
    sentences = []
    for batch in others:
        if speedups[batch] is None or speedups[first] is None or most == 1:
            continue
        text = (
            f"At global batch {batch}, {most} workers reach {speedups[batch]:.2f}x "
            f"instead of {speedups[first]:.2f}x at {first}"
        )
        if noise:
            samples = relative_samples(batch, first, noise["critical_batch"])
            text += f", but need {samples:.2f}x the samples for the same loss"
        sentences.append(f"{text}.")
    if noise:
        sentences.append(
            f"The gradient noise scale is about {noise['critical_batch']:,.0f} "
            "samples: global batches well below it waste no samples, larger ones do."
        )
    return sentences


def _nodes(found: Fields, micro_batches: int, settings: Settings) -> list[str]:
    batch = settings.global_batches[0]
    lines = [
        line
        for line in found["predictions"]
        if line["where"] == "nodes" and line["global_batch"] == batch
    ]
    if len(lines) < 2:
        return []
    best = lines[0]
    for line in lines[1:]:
        if line["samples_per_second"] / best["samples_per_second"] < 1 + WORTH:
            break
        best = line
    per_node = best["workers"] // best["nodes"]
    nodes, workers = _many(best["nodes"], "node"), _many(per_node, "worker")
    text = (
        f"Predicted over this network: {nodes} of {workers} reach "
        f"{best['speedup']:.1f}x "
        f"({best['low'] / best['samples_per_second'] * best['speedup']:.1f} to "
        f"{best['high'] / best['samples_per_second'] * best['speedup']:.1f})"
    )
    if best["micro_batches"] != micro_batches:
        text += f" with `--set micro_batches={best['micro_batches']}`"
    if best is lines[-1]:
        return [f"{text}, and more nodes would still help."]
    return [f"{text}. Beyond {nodes} the network eats the gain."]


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _honesty(found: Fields) -> list[str]:
    if found["no_fit_because"]:
        return [f"No model was fitted. {found['no_fit_because']}"]
    held_out = found["held_out"]
    if held_out is None:
        text = (
            "Nothing could be held out to check the model: that needs a third worker "
            "count."
        )
    else:
        text = (
            f"Check: {held_out['workers']} workers, predicted from fewer, reach "
            f"{held_out['predicted']:,.0f} samples/s; measured: "
            f"{held_out['measured']:,.0f} ({held_out['error']:+.1%})."
        )
    return [text, *found["model"]["not_told_apart"]]
