"""Fit the model's parameters, each to the phase that it describes.

The phases of a step are measured one by one, so every term has observations of its own
and a small linear problem with non-negative unknowns; a fit to total times could not
tell a slow exchange from a slow optimizer. Residuals are in shares of the step's time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from samestep.scaling.grid import Point
from samestep.scaling.intervals import Runs
from samestep.scaling.step_model import MEANING, Model, Work, expected_maximum, work
from samestep.scaling.study import Measurement


Floats = NDArray[np.float64]

COMPUTE = ("data", "forward", "backward")
NAMED = (*COMPUTE, "wait", "exchange", "optimizer")
MAX_KAPPA = 2.0
RIDGE = 1e-4
"""Weight of the penalty on large parameters, relative to the residuals.

It splits evenly what the measurements cannot attribute to one parameter."""


@dataclass(frozen=True)
class Observation:
    """One point: medians over rounds of the seconds per step, mean over ranks."""

    point: Point
    work: Work
    """What one training does."""
    together: int
    """Workers on the machine at the same time."""
    step: float
    compute: float
    backward: float
    wait: float
    exchange: float
    optimizer: float
    other: float
    adding: float
    """Seconds to add one gradient to another."""


def observe(point: Point, runs: Sequence[Measurement]) -> Observation:
    """Return the medians over rounds, with phases scaled to add up to the step."""
    phases = {
        name: median(run.per_step(name) for run in runs) for name in runs[0].workers[0]
    }
    step = median(run.seconds / run.steps for run in runs)
    scale = step / (sum(phases.values()) or 1.0)
    named = {name: scale * phases.get(name, 0.0) for name in NAMED}
    trained_by = 1 if point.kind == "limit" else point.workers
    return Observation(
        point=point,
        work=work(trained_by, point.global_batch, point.micro_batches),
        together=point.workers,
        step=step,
        compute=sum(named[name] for name in COMPUTE),
        backward=named["backward"],
        wait=named["wait"],
        exchange=named["exchange"],
        optimizer=named["optimizer"],
        other=step - sum(named.values()),
        adding=median(run.add_seconds for run in runs),
    )


def observations(runs: Runs, rounds: Sequence[int] | None = None) -> list[Observation]:
    """Return an observation of every point.

    With `rounds`, only those rounds count, each as often as it is listed (bootstrap).
    """
    observed = []
    for point, own in runs.items():
        by_round = {run.round: run for run in own}
        chosen = [by_round[r] for r in rounds or by_round if r in by_round]
        if chosen:
            observed.append(observe(point, chosen))
    return observed


def fit(
    seen: Sequence[Observation], exchange: str, cores: int, gradient_bytes: int
) -> Model:
    """Fit the model to observations."""
    trained = [o for o in seen if o.point.kind != "limit"]
    backward = fmean(o.backward / o.compute for o in trained)
    parameters = dict.fromkeys(MEANING, 0.0) | {"q": 1.0}
    model = Model(parameters, exchange, cores, gradient_bytes, backward)
    # The model shares this dict: later fits use the parameters of earlier ones.
    parameters["rho"] = median(o.adding for o in seen) / gradient_bytes
    parameters |= _fit_compute(seen, model)
    parameters |= _fit_optimizer(trained, model)
    parameters["o0"] = max(0.0, fmean(o.other for o in trained))
    parameters |= _fit_straggling(trained, model)
    parameters |= _fit_exchange(trained, model)
    return model


def _fit_compute(seen: Sequence[Observation], model: Model) -> dict[str, float]:
    """Search for kappa; for each kappa the rest is a linear problem."""
    from scipy.optimize import minimize_scalar

    cores, rho = model.cores, model.parameters["rho"] * model.gradient_bytes
    # Beyond the cores, workers take turns, which hides what kappa describes.
    usable = [o for o in seen if o.together <= cores or o.point.kind == "limit"]
    crowd = np.array([model.crowd(o.together) for o in usable])
    others = np.array([min(o.together, cores) - 1 for o in usable])
    done = [o.work for o in usable]
    terms = np.array([[fmean(w.micro_batches), fmean(w.samples)] for w in done])
    adding = np.array([rho * fmean(w.merges) for w in done])
    seconds = np.array([o.compute for o in usable])
    weights = 1 / np.array([o.step for o in usable])

    def solve(kappa: float) -> tuple[Floats, float]:
        slow = crowd * (1 + kappa * others)
        left = np.maximum(seconds - slow * adding, 0)
        return nonnegative(terms * slow[:, None], left, weights)

    kappa = 0.0
    if others.any():
        search = minimize_scalar(
            lambda k: solve(k)[1], bounds=(0, MAX_KAPPA), method="bounded"
        )
        kappa = min((float(search.x), 0.0), key=lambda k: solve(k)[1])
    alpha, beta = solve(kappa)[0].tolist()
    return {"alpha": alpha, "beta": beta, "kappa": kappa}


def _fit_optimizer(seen: Sequence[Observation], model: Model) -> dict[str, float]:
    rows = []
    for o in seen:
        crowd, shared = model.crowd(o.together), model.exchange == "shared"
        rows.append([crowd, crowd / o.together] if shared else [0.0, crowd])
    u0, u1 = _solve(np.array(rows), seen, [o.optimizer for o in seen])
    return {"u0": u0, "u1": u1}


def _fit_straggling(seen: Sequence[Observation], model: Model) -> dict[str, float]:
    """Fit the waiting that even shares do not explain."""
    several = [o for o in seen if o.together > 1]
    if not several:
        return {}
    terms, left = [], []
    for o in several:
        each = model.compute(o.work, o.together)
        critical = max(*each, sum(each) / model.cores)
        if o.together <= model.cores:
            left.append(max(0.0, o.wait - (max(each) - fmean(each))))
        else:  # workers take turns on the cores: waiting is part of computing
            left.append(max(0.0, o.compute + o.wait - critical))
        terms.append([expected_maximum(o.together) * sqrt(critical)])
    (nu,) = _solve(np.array(terms), several, left)
    return {"nu": nu}


def _fit_exchange(seen: Sequence[Observation], model: Model) -> dict[str, float]:
    n, shared = float(model.gradient_bytes), model.exchange == "shared"
    names = ("e0", "e1", "lambda") if shared else ("e0", "lambda", "tau")
    rows, seconds = [], []
    for o in seen:
        crowd, p = model.crowd(o.together), o.together
        barriers = [min(1, p - 1), o.work.rounds]
        moved = barriers if shared else [p - 1, (p - 1) * n * o.work.rows]
        rows.append([1.0, *(crowd * value for value in moved)])
        adding = crowd * model.adding(o.work) if p > 1 else 0.0
        seconds.append(max(0.0, o.exchange - adding))
    fitted = dict(zip(names, _solve(np.array(rows), seen, seconds), strict=True))
    if shared or len({o.together for o in seen}) < 4:
        return fitted
    return _fit_overlap(seen, model, fitted)


def _fit_overlap(
    seen: Sequence[Observation], model: Model, start: dict[str, float]
) -> dict[str, float]:
    """Fit latency, rate and overlap of Gloo together, which is not linear."""
    from scipy.optimize import least_squares

    names = ("e0", "lambda", "tau", "q")
    scale = np.array([*(max(start[name], 1e-12) for name in names[:3]), 1.0])

    def residuals(x: Floats) -> Floats:
        values = dict(zip(names, (x * scale).tolist(), strict=True))
        tried = replace(model, parameters={**model.parameters, **values})
        errors = []
        for o in seen:
            micro_batch = o.compute / fmean(o.work.micro_batches)
            predicted = tried.exchange_seconds(o.work, micro_batch)
            errors.append((predicted - o.exchange) / o.step)
        # AdaptDL's prior: no overlap without evidence of it.
        return np.array([*errors, sqrt(1e-3) * (x[3] - 1)])

    bounds = ([0, 0, 0, 1], [np.inf, np.inf, np.inf, 10])
    solved = least_squares(residuals, [1, 1, 1, 1.5], bounds=bounds)
    return dict(zip(names, (solved.x * scale).tolist(), strict=True))


def _solve(
    terms: Floats, seen: Sequence[Observation], seconds: Sequence[float]
) -> list[float]:
    # Errors count relative to the step, so that slow points do not dominate.
    weights = 1 / np.array([o.step for o in seen])
    solution, _ = nonnegative(terms, np.array(seconds), weights)
    return list(map(float, solution))


def nonnegative(
    terms: Floats, seconds: Floats, weights: Floats
) -> tuple[Floats, float]:
    """Minimise |weights (terms x - seconds)| over x >= 0; return x and the residual.

    `terms` has shape [observations, parameters]. Columns are scaled, so that the ridge
    treats all units alike.
    """
    from scipy.optimize import nnls

    weighted = terms * weights[:, None]
    scale = np.abs(weighted).max(axis=0)
    scale[scale == 0] = 1
    ridge = RIDGE * np.eye(terms.shape[1])
    padded = np.concatenate([weighted / scale, ridge])
    target = np.concatenate([seconds * weights, np.zeros(terms.shape[1])])
    solution, residual = nnls(padded, target)
    return solution / scale, float(residual)
