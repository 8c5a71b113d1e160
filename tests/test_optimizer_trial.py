"""What the user's own optimizers must be: each is tried before the training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samestep import NotReproducible, OwnCodeError
from samestep.config.optimizer import CustomOptimizer as Section
from samestep.optim.building import Definition
from samestep.state.flat import Flat
from samestep.state.layout import BLOCK, Division
from samestep.verification import optimizer_trial


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
