"""The user's own optimizer and schedule: the contract of docs/own-code.md."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Own, Train, fault, small_recipe
from test_exactness import results
from test_resume import forget_after, resume
from torch import Tensor, nn

import samestep
from samestep import NotReproducible, OwnCodeError, RecipeError, Run
from samestep.config.optimizer import CustomOptimizer as Section
from samestep.optim.building import Definition
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.state.flat import Flat
from samestep.state.layout import BLOCK, Division
from samestep.supervisor.forkserver_client import ForkServer
from samestep.verification import optimizer_trial


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

    over_gloo = train(recipe, 2, exchange="gloo")
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


class Plain(torch.optim.Optimizer):
    """Subtracts the gradient; what subclasses do besides is refused."""

    def __init__(self, params: Any, lr: float) -> None:
        """Prepare nothing."""
        super().__init__(params, {"lr": lr})
        self.calls = 0
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update each parameter with what `direction` makes of its gradient."""
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.direction(p, self.state[p]), alpha=group["lr"])

    def direction(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the gradient."""
        assert p.grad is not None
        return p.grad


class Counting(Plain):
    """Counts in an attribute."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the gradient over the number of steps."""
        return super().direction(p, state) / self.calls


class Drawing(Plain):
    """Draws from a generator of its own."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return a noisy gradient."""
        noise = torch.randn(p.shape, generator=self.generator)
        return super().direction(p, state) + noise


class Late(Plain):
    """Keeps something from the second step on."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the gradient."""
        if self.calls > 1:
            state["late"] = torch.zeros_like(p)
        return super().direction(p, state)


class Integers(Plain):
    """Keeps integers."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the gradient."""
        state["bins"] = torch.zeros(p.shape, dtype=torch.int64)
        return super().direction(p, state)


class Common(Plain):
    """Keeps a state of all parameters."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the gradient."""
        self.state["all"] = 1  # type: ignore[index]
        return super().direction(p, state)


class Normed(Plain):
    """Divides by the norm of a parameter's gradient."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return a gradient of norm 1."""
        gradient = super().direction(p, state)
        length: Tensor = gradient.norm()
        return gradient / (1 + length)


class Noisy(Plain):
    """Draws from the generator that samestep seeds."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return a noisy gradient."""
        return super().direction(p, state) + torch.randn(p.shape)


def tried(build: Callable[..., Any], division: Division, **fields: Any) -> Definition:
    """Return the definition of an optimizer after its trial."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 2 * BLOCK // 50 + 7), nn.Linear(47, 3))
    flat = Flat(model, division=division)
    section = Section(build="mine:build", lr=0.1, **fields)
    made = Definition(
        section,
        lambda groups: build(groups, section.lr),
        "`mine:build`",
        0,
        flat.layout,
    )
    return optimizer_trial.run(made, flat)


REFUSED: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "closure": (
        lambda groups, lr: torch.optim.LBFGS(list(groups[0]["params"]), lr),
        OwnCodeError,
        "must not need a `closure`",
    ),
    "attribute": (Counting, NotReproducible, "belongs in `self.state`"),
    "generator": (Drawing, NotReproducible, "a generator of its own"),
    "late": (Late, OwnCodeError, "keeps others after step 4"),
    "integers": (Integers, OwnCodeError, "`bins` in the state of .* is torch.int64"),
    "common": (Common, OwnCodeError, "has an entry for str"),
    "none": (lambda groups, lr: None, OwnCodeError, "it returned NoneType"),
    "some": (
        lambda groups, lr: Plain(groups[0]["params"][:1], lr),
        OwnCodeError,
        "has 1 of 4",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exact_is_refused_with_its_reason(kind: str) -> None:
    build, error, why = REFUSED[kind]
    with pytest.raises(error, match=why):
        tried(build, "none")


@pytest.mark.parametrize("build", [Normed, Noisy])
def test_an_update_that_is_not_elementwise_is_not_divided(
    build: Callable[..., Any],
) -> None:
    tried(build, "none")
    with pytest.raises(OwnCodeError, match="is declared elementwise"):
        tried(build, "aligned")


def test_a_weight_decay_that_an_optimizer_does_not_have_is_refused() -> None:
    with pytest.raises(OwnCodeError, match="has no `weight_decay`"):
        tried(Plain, "none", weight_decay=0.1)


ELEMENTWISE = {
    torch.optim.Adadelta: ("square_avg", "acc_delta"),
    torch.optim.Adagrad: ("sum",),
    torch.optim.Adamax: ("exp_avg", "exp_inf"),
    torch.optim.ASGD: ("ax",),
    torch.optim.NAdam: ("exp_avg", "exp_avg_sq"),
    torch.optim.RAdam: ("exp_avg", "exp_avg_sq"),
    torch.optim.Rprop: ("prev", "step_size"),
}


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_optimizers_of_torch_are_divided(
    kind: type[torch.optim.Optimizer],
) -> None:
    made = tried(lambda groups, lr: kind(groups, lr=lr), "aligned")  # type: ignore[call-arg]
    assert made.layout.states == ELEMENTWISE[kind]
    assert all(offset % BLOCK == 0 for offset in made.layout.offsets)


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
