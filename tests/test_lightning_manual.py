"""Manual optimization: `training_step` makes steps of the whole global batch."""

from pathlib import Path
from typing import Any

import lightning_gan
import pytest
import torch
from test_lightning import LIGHTNINGS_OWN, LOADER, Module, fit, group
from test_loop import threads

from samestep import NotReproducible, OwnCodeError
from samestep.lightning import SamestepStrategy


assert threads, group  # fixtures for every test here


def trained(out: Path, processes: int, noisy: bool, size: int) -> str:
    torch.manual_seed(0)
    module = lightning_gan.Gan(noisy, out)
    strategy = SamestepStrategy(6, start_method="fork")
    lightning_gan.fit(module, strategy, processes, size)
    return out.read_text()


@LIGHTNINGS_OWN
def test_a_gan_is_the_same_at_any_number_of_processes(tmp_path: Path) -> None:
    """With two optimizers and schedules, BatchNorm, dropout, noise and clipping."""
    alone, *others = (trained(tmp_path / str(n), n, True, 76) for n in (1, 2, 3))
    assert all(other == alone for other in others)


@LIGHTNINGS_OWN
def test_a_batch_may_have_fewer_samples_than_processes(tmp_path: Path) -> None:
    """They clear and clip gradients all the same."""
    alone, others = (trained(tmp_path / str(n), n, False, 18) for n in (1, 5))
    assert others == alone


def gan(strategy: Any, dtype: torch.dtype = torch.float32) -> lightning_gan.Gan:
    torch.manual_seed(0)
    module = lightning_gan.Gan(noisy=False)
    lightning_gan.fit(module.to(dtype), strategy)
    return module


@LIGHTNINGS_OWN
def test_one_micro_batch_is_what_lightning_does() -> None:
    exact, plain = gan(SamestepStrategy(1)), gan("auto")
    assert exact.lines == plain.lines
    for name, value in plain.state_dict().items():
        assert torch.equal(exact.state_dict()[name], value), name


@LIGHTNINGS_OWN
def test_micro_batches_have_the_gradient_of_the_global_batch() -> None:
    exact = gan(SamestepStrategy(6)).state_dict()
    for name, value in gan("auto", torch.float64).state_dict().items():
        torch.testing.assert_close(exact[name].double(), value, atol=1e-6, rtol=1e-6)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).square().mean())
        self.change(batch[0], optimizer)
        optimizer.step()

    def change(self, x: torch.Tensor, optimizer: Any) -> None:
        pass


class Choosing(Manual):
    """Makes steps for some samples only."""

    def change(self, x: torch.Tensor, optimizer: Any) -> None:
        if x.mean() > 0:
            optimizer.step()


class Unsummed(Manual):
    def change(self, x: torch.Tensor, optimizer: Any) -> None:
        self.layer(x).square().mean().backward()


class Decaying(Manual):
    """Changes weights without an optimizer."""

    def change(self, x: torch.Tensor, optimizer: Any) -> None:
        with torch.no_grad():
            self.layer.weight.mul_(0.9)


class Raw(Manual):
    def change(self, x: torch.Tensor, optimizer: Any) -> None:
        self.optimizers(use_pl_optimizer=False).step()


class Searching(Manual):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Choosing, "has come to"),
        (Unsummed, "changed the gradients differently"),
        (Decaying, "Only the optimizer may change parameters"),
        (Raw, "`use_pl_optimizer=False`"),
        (Searching, "an optimizer that needs one pass"),
    ],
)
@LIGHTNINGS_OWN
def test_steps_that_are_not_of_all_micro_batches_are_refused(
    tmp_path: Path, module: type[Manual], message: str
) -> None:
    with pytest.raises((OwnCodeError, NotReproducible), match=message):
        fit(module(), tmp_path, LOADER)


class Closing(Manual):
    """Computes the gradient in a closure, and returns nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch[0]).square().mean())

        optimizer = self.optimizers()
        optimizer.step(closure)


@LIGHTNINGS_OWN
def test_a_closure_is_what_calls_in_a_row_are(tmp_path: Path) -> None:
    modules = Manual(), Closing()
    for module in modules:
        fit(module, tmp_path, LOADER)
        assert module.global_step == 3
    assert torch.equal(*(module.layer.weight for module in modules))
