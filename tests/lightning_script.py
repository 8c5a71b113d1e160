"""Trainings of Lightning users: `lightning_script.py DIRECTORY PROCESSES [OPTION ...]`.

Several may follow each other, with `--` between them. Options: `micro=COUNT`,
`accumulate=COUNT`, `float64`, `gan`, `stream`, `exchange=NAME`, `kill=RANK:BATCH` (with
SIGKILL), `terminate=RANK:BATCH` (with SIGTERM), `stop=BATCH` (saved by all), `resume`.
Writes what must be equal to `sha256` and `lines.json`; with `plain`, which leaves out
dropout and BatchNorm, one process also writes the loss of its first batch, and that of
the same samples in float64.
"""

import copy
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import lightning_gan
import torch
from lightning.pytorch.callbacks import EarlyStopping
from told_stream import Told
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAUROC

from samestep.lightning import SamestepStrategy
from samestep.state.fingerprint import fingerprint


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """BatchNorm, dropout, a schedule for each step, logs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)
        )
        self.last = nn.Linear(16, 3)
        self.squares, self.area = MeanSquaredError(), MulticlassAUROC(3)
        self.lines: list[object] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(self.net(x)))

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        x, y = batch
        outputs = self(x)
        loss = functional.cross_entropy(outputs, y)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.squares(outputs.softmax(1)[:, 0], (y == 0).float())
        self.log("squares", self.squares, on_step=True, on_epoch=True)
        self.log("largest", outputs.max(), reduce_fx="max")
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        x, y = batch
        outputs = self(x)
        right = (outputs.argmax(1) == y).float().mean()
        losses = {"val_loss": functional.cross_entropy(outputs, y), "val_acc": right}
        self.log_dict(losses, sync_dist=True)
        self.area.update(outputs, y)
        self.log("area", self.area)

    def on_after_backward(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
        self.lines.append(["gradient", float(norm)])

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


SEEN = 5
"""Items of a line for a batch."""


class Plain(Classifier):
    """One whose loss of a batch is that of its micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        first = nn.Sequential(self.net, self.last)
        self.first = [copy.deepcopy(first).double()]  # in a list: no submodule
        self.pieces: list[list[torch.Tensor]] = []

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        if batch_idx == self.current_epoch == 0:
            self.pieces.append(batch)
        return super().training_step(batch, batch_idx)  # type: ignore[no-untyped-call]

    def losses(self) -> list[float]:
        """Return the first loss, and that of all its samples at once."""
        x, y = map(torch.cat, zip(*self.pieces, strict=True))
        whole = functional.cross_entropy(self.first[0](x.double()), y)
        lines: list[Any] = self.lines
        batches = [line for line in lines if len(line) == SEEN]
        return [batches[0][-1]["loss_step"], float(whole)]


class Lines(lightning.Callback):  # type: ignore[misc]
    """Notes what other callbacks and loggers can see, and saves every other batch."""

    def __init__(self, out: Path, given: dict[str, str]) -> None:
        self._out, self._lines = out, list[object]()
        at = given.get("kill") or given.get("terminate") or "-1:-1"
        self._rank, self._batch = map(int, at.split(":"))
        self._signal = signal.SIGKILL if "kill" in given else signal.SIGTERM
        self._stop = int(given.get("stop", -1))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.lines = self._lines

    def state_dict(self) -> dict[str, Any]:
        return {"lines": json.dumps(self._lines)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lines[:] = json.loads(state["lines"])

    def _metrics(self, trainer: Any) -> dict[str, float]:
        return {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):  # type: ignore[no-untyped-def]
        seen = [trainer.global_step, batch_idx, batch.size, float(outputs["loss"])]
        self._lines.append([*seen, self._metrics(trainer)])
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if (done % 2 or done == self._stop) and not trainer.is_last_batch:
            trainer.save_checkpoint(self._out / "saved.ckpt")
        if trainer.global_rank == self._rank and done == self._batch:
            os.kill(os.getpid(), self._signal)
        if trainer.received_sigterm:
            (self._out / f"told-{trainer.global_rank}").write_text(str(done))
        if done == self._stop or trainer.received_sigterm:
            sys.exit(1)

    def on_validation_end(self, trainer, module):  # type: ignore[no-untyped-def]
        self._lines.append([trainer.current_epoch, self._metrics(trainer)])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 0:
            (self._out / "lines.json").write_text(json.dumps(self._lines))
            (self._out / "sha256").write_text(fingerprint(pl_module.state_dict()))
            is_plain = isinstance(pl_module, Plain) and trainer.world_size == 1
            if is_plain and pl_module.pieces:  # it was here at the start
                losses = json.dumps(pl_module.losses())
                (self._out / "losses.json").write_text(losses)


def samples(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def fit(out: Path, processes: int, *options: str) -> None:
    """Train; raises ProcessException if a process was killed, or all were stopped."""
    given = dict(option.partition("=")[::2] for option in options)
    out.mkdir(exist_ok=True)
    lightning.seed_everything(7, verbose=False)
    is_gan = "gan" in given
    kind = Plain if "plain" in given else Classifier
    module = lightning_gan.Gan(noisy=True) if is_gan else kind()
    stopping = [] if is_gan else [EarlyStopping("val_loss", patience=5)]
    saved = out / "saved.ckpt"
    micro_batches = int(given.get("micro", 6))
    exchange: Any = given.get("exchange", "auto")
    trainer = lightning_gan.quiet_trainer(
        SamestepStrategy(micro_batches, exchange=exchange, start_method="fork"),
        processes,
        max_epochs=3,
        gradient_clip_val=None if is_gan else 0.5,
        accumulate_grad_batches=int(given.get("accumulate", 1)),
        precision="64-true" if "float64" in given else "32-true",
        callbacks=[*stopping, Lines(out, given)],
    )
    if is_gan:
        loaders: list[Any] = [DataLoader(lightning_gan.samples(96), 36, shuffle=True)]
    else:
        data: Any = samples(168, 0)
        is_stream = "stream" in given
        data = Told(data, out / "begun") if is_stream else data
        loaders = [
            DataLoader(data, 48, shuffle=not is_stream),
            DataLoader(samples(41, 1), 16),
        ]
    resumed = saved if "resume" in given and saved.exists() else None
    trainer.fit(module, *loaders, ckpt_path=resumed)


def main() -> None:
    warnings.simplefilter("ignore")
    for run in " ".join(sys.argv[1:]).split(" -- "):
        out, processes, *options = run.split()
        try:
            fit(Path(out), int(processes), *options)
        except ProcessException:
            if not any(option.startswith(("kill=", "stop=")) for option in options):
                raise


if __name__ == "__main__":
    main()
