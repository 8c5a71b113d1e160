"""Sentences with numbers, computed from the fields of scaling.json. Pure."""

from samestep.scaling.grid import Settings
from samestep.scaling.predict import relative_samples
from samestep.system.json_values import JsonObject


Fields = JsonObject

WORTH = 0.05
"""A gain below this is not worth another node."""
ORDINALS = {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth"}


def advise(
    analysis: Fields, micro_batches: int, settings: Settings, cores: int
) -> list[str]:
    """Say what was measured and what to do about it, most important first."""
    first = settings.global_batches[0]
    return [
        *_speedups(_strong(analysis, first)),
        *_one_more(analysis, micro_batches, settings, cores),
        *_fastest(_strong(analysis, first)),
        *_batches(analysis, settings),
        *_nodes(analysis, micro_batches, first),
        *_check(analysis),
    ]


def _strong(analysis: Fields, batch: int) -> list[Fields]:
    return [
        point
        for point in analysis["points"]
        if point["kind"] == "strong" and point["global_batch"] == batch
    ]


def _predicted(analysis: Fields, where: str, batch: int) -> list[Fields]:
    return [
        line
        for line in analysis["predictions"]
        if line["where"] == where and line["global_batch"] == batch
    ]


def _speedups(points: list[Fields]) -> list[str]:
    sentences = []
    for point in points:
        if point["workers"] == 1 or point["speedup"] is None:
            continue
        text = (
            f"{point['workers']} workers: {point['speedup']:.2f}x "
            f"({point['speedup_low']:.2f} to {point['speedup_high']:.2f})"
        )
        if limit := point["limit_speedup"]:
            text += (
                f", {point['efficiency_of_limit']:.0%} of what {point['workers']} "
                f"independent trainings reach on this machine ({limit:.2f}x)"
            )
        sentences.append(f"{text}.")
    if points[-1]["workers"] > 1:
        sentences.append(_where_time_goes(points[-1]))
    return sentences


def _where_time_goes(point: Fields) -> str:
    phases = point["seconds_by_phase"]
    total = sum(phases.values()) or 1.0
    exchange, wait = phases.get("exchange", 0.0), phases.get("wait", 0.0)
    return (
        f"With {point['workers']} workers a step takes "
        f"{1e3 * point['step_seconds']:.2f} ms, of which {exchange / total:.0%} is "
        f"exchange and {wait / total:.0%} is waiting for the slowest worker."
    )


def _one_more(
    analysis: Fields, micro_batches: int, settings: Settings, cores: int
) -> list[str]:
    """Say what one more worker than measured would gain."""
    most = settings.workers[-1]
    if most >= micro_batches:
        return [
            f"More than {micro_batches} workers need more micro-batches, such as "
            f"`--set micro_batches={2 * micro_batches}` (another recipe and result)."
        ]
    predicted = _predicted(analysis, "machine", settings.global_batches[0])
    rates = {line["workers"]: line["samples_per_second"] for line in predicted}
    if most + 1 not in rates:
        return []
    gain = rates[most + 1] / rates[most] - 1
    name = ORDINALS.get(most + 1, f"{most + 1}th")
    article = "An" if name[0] in "e8" else "A"
    why = f": this machine has {cores} cores" if most >= cores else ""
    amount = f"gain {gain:.0%}" if gain > 0 else f"lose {-gain:.0%}"
    if abs(gain) < 0.005:
        amount = "gain nothing"
    return [f"{article} {name} would {amount}{why}."]


def _fastest(points: list[Fields]) -> list[str]:
    """Name the fastest measured point, if it is not the one with most workers."""
    best = max(points, key=lambda point: float(point["samples_per_second"]))
    last = points[-1]
    if best is last:
        return []
    workers = _plural(best["workers"], "worker")
    return [f"Fastest measured: {workers}; {last['workers']} are slower."]


def _batches(analysis: Fields, settings: Settings) -> list[str]:
    """Compare the speed-ups at larger global batches with their cost in samples."""
    first, *others = settings.global_batches
    most, noise = settings.workers[-1], analysis["noise"]
    speedups = {
        batch: next(
            (
                point["speedup"]
                for point in _strong(analysis, batch)
                if point["workers"] == most
            ),
            None,
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


def _nodes(analysis: Fields, micro_batches: int, batch: int) -> list[str]:
    """Say up to how many nodes the network pays off."""
    lines = _predicted(analysis, "nodes", batch)
    if len(lines) < 2:
        return []
    best = lines[0]
    for line in lines[1:]:
        if line["samples_per_second"] / best["samples_per_second"] < 1 + WORTH:
            break
        best = line
    nodes = _plural(best["nodes"], "node")
    workers = _plural(best["workers"] // best["nodes"], "worker")
    scale = best["speedup"] / best["samples_per_second"]
    text = (
        f"Predicted over this network: {nodes} of {workers} reach "
        f"{best['speedup']:.1f}x ({scale * best['low']:.1f} to "
        f"{scale * best['high']:.1f})"
    )
    if best["micro_batches"] != micro_batches:
        text += f" with `--set micro_batches={best['micro_batches']}`"
    if best is lines[-1]:
        return [f"{text}, and more nodes would still help."]
    return [f"{text}. Beyond {nodes} the network cancels the gain."]


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _check(analysis: Fields) -> list[str]:
    """Say how well the model predicts, and what the measurements leave open."""
    if analysis["no_fit_because"]:
        return [f"No model was fitted. {analysis['no_fit_because']}"]
    held_out = analysis["held_out"]
    text = (
        "Nothing could be held out to check the model: that needs a third worker count."
    )
    if held_out:
        text = (
            f"Check: {held_out['workers']} workers, predicted from fewer, reach "
            f"{held_out['predicted']:,.0f} samples/s; measured: "
            f"{held_out['measured']:,.0f} ({held_out['error']:+.1%})."
        )
    return [text, *analysis["model"]["not_told_apart"]]
