"""Sentences with numbers, computed from the fields of scaling.json. Pure."""

from samestep.document.formatting import plural
from samestep.output.schema import Analysis, Point, Prediction
from samestep.scaling.predict import relative_samples
from samestep.scaling.study import Study


WORTH = 0.05
"""A gain below this is not worth another node."""
ORDINALS = {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth"}


def advise(analysis: Analysis, study: Study, cores: int) -> list[str]:
    """Say what was measured and what to do about it, most important first."""
    strong = _strong(analysis, study.settings.global_batches[0])
    return [
        *_speedups(strong),
        *_one_more(analysis, study, cores),
        *_fastest(strong),
        *_batches(analysis, study),
        *_nodes(analysis, study),
        *_check(analysis),
    ]


def _strong(analysis: Analysis, batch: int) -> list[Point]:
    return [
        point
        for point in analysis.points
        if point.kind == "strong" and point.global_batch == batch
    ]


def _predicted(analysis: Analysis, study: Study, where: str) -> list[Prediction]:
    """Return the predictions at the first global batch."""
    return [
        line
        for line in analysis.predictions
        if line.where == where and line.global_batch == study.settings.global_batches[0]
    ]


def _rate(of: Point | Prediction) -> float:
    assert of.samples_per_second is not None
    return of.samples_per_second


def _speedups(points: list[Point]) -> list[str]:
    sentences = []
    for point in points:
        if point.workers == 1 or point.speedup is None:
            continue
        text = (
            f"{point.workers} workers: {point.speedup:.2f}x "
            f"({point.speedup_low:.2f} to {point.speedup_high:.2f})"
        )
        if point.limit_speedup:
            text += (
                f", {point.efficiency_of_limit:.0%} of what {point.workers} "
                "independent trainings reach on this machine "
                f"({point.limit_speedup:.2f}x)"
            )
        sentences.append(f"{text}.")
    last = points[-1]
    if last.workers > 1:
        sentences.append(
            f"With {last.workers} workers a step takes "
            f"{1e3 * (last.step_seconds or 0.0):.2f} ms, of which "
            f"{last.share('exchange'):.0%} is exchange and {last.share('wait'):.0%} is "
            "waiting for the slowest worker."
        )
    return sentences


def _one_more(analysis: Analysis, study: Study, cores: int) -> list[str]:
    """Say what one more worker than measured would gain."""
    most, micro_batches = study.settings.workers[-1], study.recipe.micro_batches
    if most >= micro_batches:
        return [
            f"More than {micro_batches} workers need more micro-batches, such as "
            f"`--set micro_batches={2 * micro_batches}` (another recipe and result)."
        ]
    predicted = _predicted(analysis, study, "machine")
    rates = {line.workers: _rate(line) for line in predicted}
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


def _fastest(points: list[Point]) -> list[str]:
    """Name the fastest measured point, if it is not the one with most workers."""
    best, last = max(points, key=_rate), points[-1]
    if best is last:
        return []
    workers = plural(best.workers, "worker")
    return [f"Fastest measured: {workers}; {last.workers} are slower."]


def _batches(analysis: Analysis, study: Study) -> list[str]:
    """Compare the speed-ups at larger global batches with their cost in samples."""
    first, *others = study.settings.global_batches
    most = study.settings.workers[-1]
    speedups = {
        point.global_batch: point.speedup
        for point in analysis.points
        if point.kind == "strong" and point.workers == most
    }
    critical_batch = analysis.noise and analysis.noise.critical_batch
    sentences = []
    for batch in others:
        if speedups[batch] is None or speedups[first] is None or most == 1:
            continue
        text = (
            f"At global batch {batch}, {most} workers reach {speedups[batch]:.2f}x "
            f"instead of {speedups[first]:.2f}x at {first}"
        )
        if critical_batch:
            samples = relative_samples(batch, first, critical_batch)
            text += f", but need {samples:.2f}x the samples for the same loss"
        sentences.append(f"{text}.")
    if critical_batch:
        sentences.append(
            f"The gradient noise scale is about {critical_batch:,.0f} samples: global "
            "batches well below it waste no samples, larger ones do."
        )
    return sentences


def _nodes(analysis: Analysis, study: Study) -> list[str]:
    """Say up to how many nodes the network pays off."""
    lines = _predicted(analysis, study, "nodes")
    if len(lines) < 2:
        return []
    best = lines[0]
    for line in lines[1:]:
        if _rate(line) / _rate(best) < 1 + WORTH:
            break
        best = line
    nodes = plural(best.nodes, "node")
    workers = plural(best.workers // best.nodes, "worker")
    scale = (best.speedup or 0.0) / _rate(best)
    low, high = (scale * (rate or 0.0) for rate in (best.low, best.high))
    text = (
        f"Predicted over this network: {nodes} of {workers} reach "
        f"{best.speedup:.1f}x ({low:.1f} to {high:.1f})"
    )
    if best.micro_batches != study.recipe.micro_batches:
        text += f" with `--set micro_batches={best.micro_batches}`"
    if best is lines[-1]:
        return [f"{text}, and more nodes would still help."]
    return [f"{text}. Beyond {nodes} the network cancels the gain."]


def _check(analysis: Analysis) -> list[str]:
    """Say how well the model predicts, and what the measurements leave open."""
    if analysis.model is None:
        return [f"No model was fitted. {analysis.no_fit_because}"]
    text = (
        "Nothing could be held out to check the model: that needs a third worker count."
    )
    if held_out := analysis.held_out:
        text = (
            f"Check: {held_out.workers} workers, predicted from fewer, reach "
            f"{held_out.predicted:,.0f} samples/s; measured: "
            f"{held_out.measured:,.0f} ({held_out.error:+.1%})."
        )
    return [text, *analysis.model.not_told_apart]
