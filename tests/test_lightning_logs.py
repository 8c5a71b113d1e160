"""What is logged with Lightning: metrics of torchmetrics, and numbers of every kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_gan import quiet_trainer
from test_lightning import LIGHTNINGS_OWN, LOADER, Module, fit, group
from test_loop import threads
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryRecall
from torchmetrics.regression import PearsonCorrCoef

from samestep import OwnCodeError
from samestep.lightning import SamestepStrategy


assert threads, group  # fixtures for every test here
SAMPLES = torch.randn(38, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (SAMPLES.sum(1) > 0).long()


class Measured(Module):
    """Logs metrics with integers, floats and lists, and numbers that are reduced."""

    def __init__(self, out: Path, stop: int = -1) -> None:
        super().__init__()
        self.accuracy, self.squares = BinaryAccuracy(), MeanSquaredError()
        self.mean, self.area = MeanMetric(), BinaryAUROC()
        self.several = MetricCollection([BinaryAccuracy(), BinaryRecall()])
        self.out, self.stop, self.lines = out, stop, list[Any]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        output = self.layer(x)[:, 0]
        self.squares(output, y.float())
        self.log("squares", self.squares, on_step=True, on_epoch=True)
        self.log("largest", output.max(), reduce_fx="max", on_epoch=True)
        self.log("right", ((output > 0) == y).sum().float(), reduce_fx=torch.sum)
        return (output - y).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        x, y = batch
        output = self.layer(x)[:, 0].sigmoid()
        if dataloader_idx:
            self.log("second", output.mean(), add_dataloader_idx=False)
            return
        self.accuracy(output, y)
        self.log("accuracy", self.accuracy, add_dataloader_idx=False)
        self.mean.update(output)
        self.area.update(output, y)
        self.several.update(output, y)

    def note(self) -> None:
        metrics = self.trainer.callback_metrics.items()
        self.lines.append({name: float(value) for name, value in sorted(metrics)})

    def on_train_batch_end(self, *_: Any) -> None:
        self.note()
        if self.global_step == self.stop:
            self.trainer.save_checkpoint(self.out)
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        self.note()

    def on_validation_epoch_end(self) -> None:
        values = {"mean": self.mean.compute(), "area": self.area.compute()}
        self.log_dict(values | self.several.compute())
        for metric in (self.mean, self.area, self.several):
            metric.reset()

    def on_validation_end(self) -> None:
        self.note()

    def on_fit_end(self) -> None:
        if self.global_rank == 0 and self.stop < 0:
            self.out.write_text(json.dumps(self.lines))


def measured(module: Measured, strategy: Any, processes: int = 1, **fit: Any) -> Any:
    """Train for two epochs; the last batches have fewer samples than processes."""
    trainer = quiet_trainer(strategy, processes, num_sanity_val_steps=0)
    data = TensorDataset(SAMPLES, TARGETS)
    loaders = DataLoader(data, 12), [DataLoader(data, 9), DataLoader(data, 7)]
    trainer.fit(module, *loaders, **fit)
    return module.stop < 0 and json.loads(module.out.read_text())


def exact(out: Path, processes: int, stop: int = -1, **fit: Any) -> Any:
    strategy = SamestepStrategy(6, start_method="fork")
    return measured(Measured(out, stop), strategy, processes, **fit)


@LIGHTNINGS_OWN
def test_an_epoch_that_is_resumed_logs_what_it_had_before(tmp_path: Path) -> None:
    undisturbed = exact(tmp_path / "whole.json", 2)
    exact(tmp_path / "stopped", 3, stop=2)
    resumed = exact(tmp_path / "resumed.json", 1, ckpt_path=tmp_path / "stopped")
    assert resumed == undisturbed[2:]


@LIGHTNINGS_OWN
def test_logs_are_the_same_at_any_number_of_processes(tmp_path: Path) -> None:
    """And those of Lightning with whole batches, but for rounding."""
    alone, three = (exact(tmp_path / f"{n}.json", n) for n in (1, 3))
    assert three == alone
    plain = measured(Measured(tmp_path / "plain.json"), "auto")
    assert len(plain) == len(alone)
    for line, expected in zip(alone, plain, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


class Stacked(Module):
    def __init__(self) -> None:
        super().__init__()
        self.metric: Metric = PearsonCorrCoef()


@LIGHTNINGS_OWN
def test_metrics_whose_states_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OwnCodeError, match="of PearsonCorrCoef has another"):
        fit(Stacked(), tmp_path, LOADER)
