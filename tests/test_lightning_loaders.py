"""Several DataLoaders at once: a step has a collection of global batches."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning_gan import quiet_trainer
from test_lightning import LIGHTNINGS_OWN, Module, group
from test_loop import threads
from torch.utils.data import DataLoader, TensorDataset

from samestep.lightning import SamestepStrategy


assert threads, group  # fixtures for every test here


class Both(Module):
    """Has a loss on samples of each of two loaders, and may stop in its midst."""

    def __init__(self, out: Path, stop: int = -1) -> None:
        super().__init__()
        self.out, self.stop, self.lines = out, stop, list[Any]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,), (y,) = batch["long"], batch["short"]
        self.log("short", y.mean())
        return self.layer(x).square().mean() - self.layer(y).mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        short = float(self.trainer.callback_metrics["short"])
        self.lines.append([float(outputs["loss"]), short])
        if self.global_step == self.stop:
            self.trainer.save_checkpoint(self.out)
            self.trainer.should_stop = True

    def on_fit_end(self) -> None:
        if self.stop < 0 and self.global_rank == 0:
            weights = self.layer.weight.flatten().tolist()
            self.out.write_text(json.dumps([weights, *self.lines]))


def normal(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, 4, generator=generator))


def both(
    module: Both,
    strategy: Any,
    processes: int = 1,
    ckpt: Path | None = None,
    shuffle: bool = True,
) -> None:
    """Train for two epochs of 8 steps; the short loader begins again in each."""
    trainer = quiet_trainer(strategy, processes)
    loaders = {
        "long": DataLoader(normal(96, 0), 12, shuffle=shuffle),
        "short": DataLoader(normal(18, 1), 6, shuffle=shuffle),
    }
    trainer.fit(module, loaders, ckpt_path=ckpt)


@LIGHTNINGS_OWN
def test_several_loaders_are_the_same_after_a_stop_elsewhere(tmp_path: Path) -> None:
    """Stopped where the short loader is in its second cycle."""

    def trained(name: str, processes: int, **options: Any) -> Any:
        module = Both(tmp_path / name, options.pop("stop", -1))
        both(module, SamestepStrategy(6, start_method="fork"), processes, **options)
        return module.stop < 0 and json.loads(module.out.read_text())

    alone = trained("1", 1)
    assert trained("3", 3) == alone
    shorts = [line[-1] for line in alone[1:9]]
    assert len(set(shorts)) == len(shorts)  # another order in each cycle
    trained("stopped", 2, stop=5)
    weights, *rest = trained("resumed", 3, ckpt=tmp_path / "stopped")
    assert [weights, *rest] == [alone[0], *alone[6:]]


@LIGHTNINGS_OWN
def test_several_loaders_have_the_gradient_of_whole_batches(tmp_path: Path) -> None:
    """Compared with Lightning, in the order of the samples."""
    plain, exact = Both(tmp_path / "plain"), Both(tmp_path / "exact")
    for module, strategy in ((plain, "auto"), (exact, SamestepStrategy(6))):
        both(module, strategy, shuffle=False)
    weights = [module.layer.weight.detach() for module in (plain, exact)]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-6)
