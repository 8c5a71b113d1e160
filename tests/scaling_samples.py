"""Measurements as a known model would give them."""

from pathlib import Path
from typing import Any

import numpy as np
from conftest import small_recipe

from samestep.scaling.grid import Point, Settings, grid
from samestep.scaling.step_model import Model, work
from samestep.scaling.study import Measurement, Study


GRADIENT_BYTES = 2_000_000
TRUE = {
    "alpha": 4e-4,
    "beta": 3e-5,
    "kappa": 0.05,
    "nu": 2e-3,
    "e0": 5e-5,
    "lambda": 1e-4,
    "e1": 1e-4,
    "tau": 3e-10,
    "rho": 2e-10,
    "q": 1.0,
    "u0": 1e-4,
    "u1": 6e-4,
    "o0": 2e-4,
}


def true_model(exchange: str = "shared", cores: int = 8, **changed: float) -> Model:
    return Model(TRUE | changed, exchange, cores, GRADIENT_BYTES)


def imagined(model: Model, point: Point, round_: int, noise: float) -> Measurement:
    """Return the measurement of a machine that follows the model exactly."""
    trained_by = 1 if point.kind == "limit" else point.workers
    done = work(trained_by, point.global_batch, point.micro_batches)
    each = model.compute(done, point.workers)
    if point.kind == "limit":
        each = [seconds * model.crowd(point.workers) for seconds in each]
    terms = model.terms(done)
    compute = sum(each) / len(each)
    critical = terms["compute"] + terms["straggle"]
    wait = critical - compute if trained_by > 1 else 0.0
    phases = {
        "data": 0.1 * compute,
        "forward": 0.4 * compute,
        "backward": 0.5 * compute,
        "exchange": terms["exchange"],
        "wait": wait,
        "optimizer": terms["optimizer"],
        "other": terms["other"],
    }
    phases = {name: noise * seconds for name, seconds in phases.items()}
    step, steps = sum(phases.values()), 100
    return Measurement(
        round=round_,
        steps=steps,
        seconds=step * steps,
        samples_per_second=point.global_batch / step * point.trainings,
        step_seconds_sd=0.0,
        workers=[{name: s * steps for name, s in phases.items()}] * point.workers,
        bytes_per_step=0,
        add_seconds=model.parameters["rho"] * GRADIENT_BYTES,
    )


def imagined_study(
    model: Model, path: Path = Path("nowhere"), noise: float = 0.0, **asked: Any
) -> Study:
    fields = {
        "workers": (1, 2, 3, 4),
        "global_batches": (240,),
        "exchange": model.exchange,
        "rounds": 5,
    }
    settings = Settings.model_validate(fields | asked)
    recipe = small_recipe(global_batch=settings.global_batches[0], micro_batches=24)
    study = Study(path, recipe, {}, settings, GRADIENT_BYTES)
    drawn = np.random.default_rng(0)
    for point in grid(settings, recipe.micro_batches):
        study.runs[point] = [
            imagined(model, point, round_, float(np.exp(noise * drawn.normal())))
            for round_ in range(1, settings.rounds + 1)
        ]
    return study


def settings(**asked: Any) -> Settings:
    fields = {"workers": (1, 2), "global_batches": (96,), "exchange": "shared"}
    return Settings.model_validate(fields | asked)
