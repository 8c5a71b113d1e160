"""lightning_plain.py with `SamestepStrategy`: the same at any number of processes.

python lightning_exact.py 2
"""

import sys

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from samestep.lightning import SamestepStrategy


class Classifier(lightning.LightningModule):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4)
        )
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.net(x)
        self.log("accuracy", (outputs.argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
        return [optimizer], [schedule]


lightning.seed_everything(0, verbose=False)
inputs = torch.randn(4_000, 20)
samples = TensorDataset(inputs, inputs[:, :4].argmax(dim=1))
train, test = torch.utils.data.random_split(samples, [3_500, 500])
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=int(sys.argv[1]),
    strategy=SamestepStrategy(micro_batches=8),
    max_epochs=3,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
model = Classifier()
trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(test, 100))
trainer.print(float(trainer.callback_metrics["accuracy"]))
trainer.print(sum(float(p.detach().double().sum()) for p in model.parameters()))
