"""A GAN of a Lightning user, with manual optimization."""

import json
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from samestep.state.fingerprint import fingerprint


class Gan(lightning.LightningModule):  # type: ignore[misc]
    """Two optimizers that take turns, both with a schedule; one gradient is clipped.

    The generator's samples are made once, and used by the passes of both.
    """

    def __init__(self, noisy: bool, out: Path | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        norms = [nn.BatchNorm1d(8), nn.Dropout(0.2)] if noisy else []
        self.generator = nn.Sequential(
            nn.Linear(4, 8), *norms, nn.Tanh(), nn.Linear(8, 6)
        )
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.noisy, self.out = noisy, out
        self.lines: list[object] = []

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.generator(z))

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        real, z = batch
        first, second = self.optimizers()
        made = self(z + torch.randn_like(z) if self.noisy else z)
        self.toggle_optimizer(first)
        loss = functional.softplus(-self.critic(made)).mean()
        self.log("generator", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.manual_backward(loss)
        self.clip_gradients(first, 0.1, "norm")
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        right = functional.softplus(-self.critic(real)).mean()
        self.manual_backward(right)
        wrong = functional.softplus(self.critic(self(z).detach())).mean()
        self.manual_backward(wrong)
        self.log("critic", right + wrong)
        norm = nn.utils.clip_grad_norm_(self.critic.parameters(), 0.5)
        self.log("norm", norm)
        if batch_idx % 2:  # accumulates over two batches
            second.step()
            second.zero_grad()
        self.untoggle_optimizer(second)
        for scheduler in self.lr_schedulers():
            scheduler.step()
        return right + wrong

    def on_after_backward(self) -> None:
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.lines.append(["gradient", float(torch.stack(norms).norm())])

    def on_train_batch_start(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        lr = self.lr_schedulers()[0].get_last_lr()
        self.lines.append([self.global_step, batch_idx, *lr])

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.lines.append({k: float(v) for k, v in sorted(metrics.items())})

    def on_fit_end(self) -> None:
        if self.out and self.global_rank == 0:
            found = [fingerprint(self.state_dict()), *self.lines]
            self.out.write_text(json.dumps(found))

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        first = torch.optim.Adam(self.generator.parameters(), 0.01)
        second = torch.optim.SGD(self.critic.parameters(), 0.1, momentum=0.9)
        schedules = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            for optimizer in (first, second)
        ]
        return [first, second], schedules


def samples(size: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(size, 10, generator=generator, dtype=torch.float64)
    real, z = torch.split(data.to(dtype), [6, 4], 1)
    return TensorDataset(real, z)


def quiet_trainer(strategy: object, processes: int = 1, **options: Any) -> Any:
    """Return a Trainer for two epochs that prints and keeps nothing."""
    return lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2} | options,
    )


def fit(module: Gan, strategy: object, processes: int = 1, size: int = 76) -> None:
    """Train for two epochs with so many samples; their last batches have fewer."""
    trainer = quiet_trainer(strategy, processes)
    trainer.fit(module, DataLoader(samples(size, module.dtype), 16))
