"""The user's own optimizer and schedule: the contract of docs/own-code.md."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Own, Train, fault, small_recipe
from test_exactness import results
from test_resume import forget_after, resume
from torch import nn

import samestep
from samestep import OwnCodeError, RecipeError, Run
from samestep.config.optimizer import CustomOptimizer as Section
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer


WIDE = """
def build(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs[0], 300), nn.ReLU(), nn.Linear(300, outputs))
"""
"""A model whose first matrix is longer than a block, and so divided."""
LION = """
class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, beta=0.9, weight_decay=0.0):
        defaults = {"lr": lr, "beta": beta, "weight_decay": weight_decay, "k": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                before = state.get("mean", torch.zeros_like(p))
                state["mean"] = before.lerp(p.grad, 1 - group["beta"])
                state["count"] = state.get("count", 0) + 1
                direction = torch.tanh(state["mean"] * 10) + 1 / state["count"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.data = p.data - group["lr"] * direction / group["k"]

def optimizer(params, lr, beta):
    return Lion(params, lr, beta)
"""
ADAFACTOR = """
def optimizer(params, lr):
    return torch.optim.Adafactor(params, lr=lr)
"""
ADAMW = """
def optimizer(params, lr):
    return torch.optim.AdamW(params, lr, fused=True)
"""
NOISY = """
class Preconditioned(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                size = len(p)
                self.state[p]["square"] = torch.eye(size, dtype=torch.bfloat16)
                self.state[p]["start"] = p.detach().clone()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state, g = self.state[p], p.grad.view(len(p), -1)
                state["square"] += (g @ g.T).bfloat16()
                noise = torch.randn_like(g) + random.random() + np.random.rand()
                step = state["square"].to(g.dtype) @ (g + 1e-3 * noise)
                p.sub_(group["lr"] * step.view_as(p) + 1e-3 * (p - state["start"]))

def optimizer(params, lr):
    return Preconditioned(params, lr)
"""
SCHEDULE = """
def schedule(step, total):
    return 1 - 0.9 * step / total
"""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "elementwise": (
        LION,
        {
            "optimizer.elementwise": True,
            "optimizer.arguments": {"beta": 0.8},
            "optimizer.weight_decay": 0.1,
            "optimizer.decay_norms_and_biases": False,
            "optimizer.max_grad_norm": 0.1,
            "optimizer.groups": [{"match": r"^2\.", "lr_factor": 0.5}],
            "ema": {"decay": 0.9},
        },
    ),
    "by-rows-and-columns": (ADAFACTOR, {"early_stopping": {"patience": 9}}),
    "large-state-and-noise": (NOISY, {"precision": "float64"}),
}


def final(run: Run) -> dict[str, Any]:
    return results(run) | {"steps": run.result["history"]}


@pytest.mark.parametrize("kind", KINDS)
def test_neither_workers_nor_kills_nor_a_resume_change_a_bit(
    train: Train, train_under: Train, own: Own, server: ForkServer, kind: str
) -> None:
    code, fields = KINDS[kind]
    recipe = own(WIDE + code + SCHEDULE, epochs=4, **fields)
    alone = train(recipe, 1)

    over_gloo = train(recipe, 2, exchange="gloo", keep_checkpoints=2)
    assert over_gloo.weights_sha256 == alone.weights_sha256
    first, *_ = checkpoint.steps(checkpoint.directory_of(over_gloo.path))
    forget_after(over_gloo.path, first)
    resumed = resume(over_gloo.path, server, 3, exchange="shared")
    assert resumed.weights_sha256 == alone.weights_sha256

    kills = [fault("kill", "update", 5, rank=1), fault("kill", "forward", 8, 0, 2)]
    killed = train_under(recipe, kills, 3, exchange="shared")
    assert killed.weights_sha256 == alone.weights_sha256
    assert killed.result["restarts"] == 2


def test_an_optimizer_of_torch_has_the_bits_of_the_built_in_one(
    train: Train, own: Own
) -> None:
    fields: dict[str, Any] = {"optimizer.weight_decay": 0.1}
    expected = train(own(WIDE, **fields, **{"optimizer.name": "adamw"}), 1)
    recipe = own(WIDE + ADAMW, **fields)
    assert train(recipe, 2).weights_sha256 == expected.weights_sha256
    divided = recipe.changed({"optimizer.elementwise": True})
    assert train(divided, 3).weights_sha256 == expected.weights_sha256


def test_functions_are_given_in_python_and_again_to_resume(
    tmp_path: Path, server: ForkServer
) -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    common: dict[str, Any] = {"view": SilentView(), "server": server}
    parts: dict[str, Any] = {
        "model": nn.Linear(4, 2),
        "data": (x, (x[:, 0] > 0).long()),
        "optimizer": lambda params, lr: torch.optim.Adadelta(params, lr=lr),
        "schedule": lambda step: 0.5**step,
    }
    out = tmp_path / "run"
    fields: dict[str, Any] = {"epochs": 2, "global_batch": 8, "lr": 0.5, "out": out}
    run = samestep.train(**parts, **common, **fields, workers=1)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr"] for line in lines if line["type"] == "step"]
    assert rates == [0.5 * 0.5**step for step in range(len(rates))]
    longer = {"workers": 2, **parts, **common}
    first, *_ = checkpoint.steps(checkpoint.directory_of(out))
    forget_after(out, first)
    assert samestep.resume(run, **longer).weights_sha256 == run.weights_sha256
    forget_after(out, first)
    with pytest.raises(OwnCodeError, match=r"Give it again: `optimizer=\.\.\.`"):
        samestep.resume(run, **longer | {"optimizer": None})


def test_a_dictionary_is_a_section_of_the_recipe(server: ForkServer) -> None:
    with pytest.raises(RecipeError, match=r"there is no field `optimizer\.momentun`"):
        samestep.train(optimizer={"name": "sgd", "lr": 0.1, "momentun": 0.9})


def test_the_command_line_takes_an_optimizer_and_a_schedule(
    own: Own, tmp_path: Path
) -> None:
    recipe = own(LION + SCHEDULE)
    assert isinstance(recipe.optimizer, Section)
    name = recipe.optimizer.build.partition(":")[0]
    command = [sys.executable, "-m", "samestep", "train", "--workers", "2", "--epochs"]
    options = [
        *("1", "--out", "run", "--no-report", "--set", "optimizer.arguments.beta=0.9"),
        *(f"--{part}={name}:{part}" for part in ("optimizer", "schedule")),
        *(f"--model={name}:build", f"--data={name}:load"),
    ]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    again = Run.open(tmp_path / "run")
    assert again.recipe.optimizer.name == again.recipe.schedule.name == "custom"


def test_a_recipe_says_what_a_custom_optimizer_or_schedule_cannot_be() -> None:
    custom = {"name": "custom", "build": "mine:build", "lr": 0.1}
    with pytest.raises(RecipeError, match=r"`optimizer\.name = custom`"):
        small_recipe(arithmetic="portable", optimizer=custom)
    with pytest.raises(RecipeError, match=r"`schedule\.name = custom`"):
        small_recipe(
            arithmetic="portable", schedule={"name": "custom", "function": "mine:f"}
        )
    with pytest.raises(RecipeError, match=r"is the field `optimizer\.lr`"):
        small_recipe(optimizer=custom | {"arguments": {"lr": 0.2}})


BAD_SCHEDULES = {
    "infinite": ("def schedule(step): return math.inf", "returned inf at step 0"),
    "negative": (
        "def schedule(step, total): return step / total - 0.5",
        "-0.5 at step 0",
    ),
    "words": ("def schedule(step): return 'high'", "could not convert string"),
    "impure": ("def schedule(step): return random.random()", "does not. Let it depend"),
    "arguments": ("def schedule(): return 1.0", "takes other arguments"),
}


@pytest.mark.parametrize("kind", BAD_SCHEDULES)
def test_a_schedule_is_a_pure_function_with_finite_values(
    own: Own, train: Train, kind: str
) -> None:
    code, why = BAD_SCHEDULES[kind]
    with pytest.raises(OwnCodeError, match=why):
        train(own(f"import math\n{code}\n"), 2)


def test_a_warm_up_multiplies_a_custom_schedule(own: Own, train: Train) -> None:
    recipe = own(SCHEDULE, **{"schedule.warmup_epochs": 1.0})
    run = train(recipe, 1)
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr"] for line in lines if line["type"] == "step"]
    assert rates == pytest.approx(
        [0.01 * (step + 1) / 3 * (1 - 0.9 * step / 3) for step in range(3)], rel=1e-15
    )
    assert all(map(math.isfinite, rates))
