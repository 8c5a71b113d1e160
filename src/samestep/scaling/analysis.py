"""From measurements to the content of scaling.json. Pure."""

import statistics
from collections.abc import Sequence
from importlib.util import find_spec

from samestep.output.schema import Analysis, HeldOut, Noise, Parameter, Prediction
from samestep.output.schema import Model as FittedModel
from samestep.scaling.advice import advise
from samestep.scaling.fit import Observation, fit, observations
from samestep.scaling.grid import Point
from samestep.scaling.intervals import band, draws, summarise
from samestep.scaling.predict import Forecaster, best_per_node, machine_counts
from samestep.scaling.step_model import EXCHANGE, FORMULA, MEANING, Model, Network
from samestep.scaling.study import Study


RESAMPLES = 200
"""Fits of the bootstrap."""


def analyse(study: Study, cores: int) -> Analysis:
    """Return what a finished scaling.json says, measured on `cores` cores."""
    analysis = Analysis(
        points=summarise(study.runs, study.settings.exchange),
        noise=_noise(study),
        no_fit_because=_no_fit(study),
    )
    if analysis.no_fit_because is None:
        analysis = _with_model(analysis, study, cores)
    return analysis.model_copy(update={"advice": advise(analysis, study, cores)})


def _no_fit(study: Study) -> str | None:
    workers, rounds = study.settings.workers, study.settings.rounds
    if find_spec("scipy") is None:
        return (
            "Fitting needs scipy, which is not installed: "
            "`pip install 'samestep[report]'`."
        )
    if len(workers) < 2 or workers[0] != 1:
        listed = ",".join(map(str, workers))
        return (
            "A model needs 1 worker and at least one more worker count; measured: "
            f"{listed}. Use `--workers 1,2`."
        )
    if rounds < 2:
        return "Intervals need at least 2 rounds; measured: 1. Use `--rounds 10`."
    return None


def _noise(study: Study) -> Noise | None:
    """Return the median at the first global batch where it was measured."""
    for batch in study.settings.global_batches:
        scales = [
            run.noise_scale
            for point, runs in study.runs.items()
            if point.kind == "strong" and point.global_batch == batch
            for run in runs
            if run.noise_scale is not None
        ]
        if scales and (scale := statistics.median(scales)) > 0:
            return Noise(noise_scale=scale, critical_batch=scale, at_global_batch=batch)
    return None


def _with_model(analysis: Analysis, study: Study, cores: int) -> Analysis:
    exchange, n = study.settings.exchange, study.gradient_bytes
    seen = observations(study.runs)
    model = fit(seen, exchange, cores, n)
    rounds = range(1, study.settings.rounds + 1)
    # Each resample refits all parameters, so that their errors stay correlated.
    resampled = [
        fit(observations(study.runs, chosen), exchange, cores, n)
        for chosen in draws(rounds, RESAMPLES)
    ]
    trained = [o for o in seen if o.point.kind != "limit"]
    misfits = [abs(model.step(o.work) / o.step - 1) for o in trained]
    held_out = hold_out(seen, exchange, cores, n)
    unseen = [abs(held_out.error or 0.0)] if held_out else []
    forecaster = Forecaster(
        model,
        resampled,
        max(*misfits, *unseen),
        {b: _rate(study, 1, b) for b in study.settings.global_batches},
        analysis.noise.critical_batch if analysis.noise else None,
    )
    fitted = FittedModel(
        formula=FORMULA + EXCHANGE[exchange],
        parameters=_parameters(model, resampled),
        median_error=statistics.median(misfits),
        max_error=max(misfits),
        cores=cores,
        not_told_apart=not_told_apart(study),
    )
    predictions = _predictions(study, cores, forecaster)
    return analysis.model_copy(
        update={"model": fitted, "held_out": held_out, "predictions": predictions}
    )


def _parameters(model: Model, resampled: Sequence[Model]) -> list[Parameter]:
    """Return the parameters with bootstrap intervals."""
    fields = []
    for name, (unit, meaning) in MEANING.items():
        value = model.parameters[name]
        low, high = band(value, [other.parameters[name] for other in resampled])
        fields.append(
            Parameter(
                name=name, value=value, low=low, high=high, unit=unit, meaning=meaning
            )
        )
    return fields


def hold_out(
    seen: Sequence[Observation], exchange: str, cores: int, gradient_bytes: int
) -> HeldOut | None:
    """Predict the largest worker count from the others; None without two others."""
    strong = [o for o in seen if o.point.kind == "strong"]
    most = max(o.together for o in strong)
    others = [o for o in seen if o.together < most]
    if len({o.together for o in others}) < 2:
        return None
    model = fit(others, exchange, cores, gradient_bytes)
    target = next(o for o in strong if o.together == most)
    batch = target.point.global_batch
    predicted = batch / model.step(target.work)
    measured = batch / target.step
    return HeldOut(
        workers=most,
        global_batch=batch,
        predicted=predicted,
        measured=measured,
        error=predicted / measured - 1,
    )


def not_told_apart(study: Study) -> list[str]:
    """Say in sentences what these measurements cannot identify."""
    sentences = []
    if len(study.settings.workers) == 2:
        sentences.append(
            "With one worker count above 1, the exchange's latency and its other cost "
            "cannot be separated; they share the time evenly."
        )
    has_calibration = any(point.kind == "calibration" for point in study.runs)
    if not has_calibration and len(study.settings.global_batches) == 1:
        sentences.append(
            "With one size of micro-batches, their fixed cost cannot be separated from "
            "the cost of their samples; add another `--global-batch`."
        )
    return sentences


def _rate(study: Study, workers: int, batch: int) -> float:
    runs = study.runs[Point("strong", workers, batch, study.recipe.micro_batches)]
    return statistics.median(run.samples_per_second for run in runs)


def _predictions(study: Study, cores: int, forecaster: Forecaster) -> list[Prediction]:
    settings, micro_batches = study.settings, study.recipe.micro_batches
    counts = machine_counts(settings.workers, cores, micro_batches)
    predictions = [
        forecaster.predict(count, batch, micro_batches)
        for batch in settings.global_batches
        for count in counts
    ]
    if settings.nodes_up_to is None:
        return predictions
    network = _network(study)
    for batch in settings.global_batches:
        rates = {n: _rate(study, n, batch) for n in settings.workers}
        per_node = best_per_node(rates, cores)
        most = min(settings.nodes_up_to, batch // per_node)
        predictions += [
            forecaster.predict(per_node, batch, micro_batches, nodes, network)
            for nodes in range(1, most + 1)
        ]
    return predictions


def _network(study: Study) -> Network:
    """Return the network, with a bandwidth in bytes of uncompressed gradients."""
    bandwidth = study.settings.bandwidth_bytes_per_second
    latency = study.settings.latency_seconds
    assert bandwidth is not None
    assert latency is not None
    # Compression (bf16) halves what is sent.
    sent = 1.0 if study.recipe.compression == "none" else 0.5
    return Network(bandwidth / sent, latency)
