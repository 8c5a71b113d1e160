"""One training with Lightning, Accelerate or Transformers, as their users write it.

    python integrated.py lightning ddp 3
    torchrun --standalone --nproc-per-node 2 integrated.py transformers samestep 3

Two processes and a global batch of 64; the second word is who sums the gradients.
Prints the seconds of each epoch.
"""

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


LIBRARY, SUMMED_BY, EPOCHS = sys.argv[1], sys.argv[2], int(sys.argv[3])
IS_EXACT = SUMMED_BY == "samestep"
MICRO_BATCHES = 2
"""As many as processes: nothing is cut finer than by DDP."""
SIZE = 64 if IS_EXACT else 32
"""Of a DataLoader's batches: of the global ones, or of those of one process."""
torch.manual_seed(0)
torch.set_num_threads(1)


def images() -> TensorDataset:
    """Random samples of the size of MNIST's."""
    return TensorDataset(torch.randn(16_000, 784), torch.randint(0, 10, (16_000,)))


def network() -> nn.Module:
    """The network of mnist-mlp-classic, 0.6 million parameters."""
    layers = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(256, 10))


def with_lightning() -> list[float]:
    import lightning

    from samestep.lightning import SamestepStrategy

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seconds = network(), list[float]()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), fused=True)

        def on_train_epoch_start(self) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    module, exact = Module(), SamestepStrategy(micro_batches=MICRO_BATCHES)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=exact if IS_EXACT else "ddp",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(images(), SIZE, shuffle=True))
    return module.seconds if trainer.is_global_zero else []


def with_accelerate() -> list[float]:
    import accelerate

    from samestep.accelerate import Accelerator

    exact = Accelerator(micro_batches=MICRO_BATCHES) if IS_EXACT else None
    accelerator = exact or accelerate.Accelerator(cpu=True)
    accelerate.utils.set_seed(0)
    model = network()
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.Adam(model.parameters(), fused=True),
        DataLoader(images(), SIZE, shuffle=True),
    )
    seconds = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for x, y in loader:
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds if accelerator.is_main_process else []


def with_transformers() -> list[float]:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from samestep.transformers import SamestepTrainer

    class Timed(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds = list[float]()

        def on_epoch_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_epoch_end(self, *_: object, **__: object) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    words, labels = torch.randint(0, 1_000, (6_400, 16)), torch.randint(0, 2, (6_400,))
    samples = [
        {"input_ids": w, "labels": y} for w, y in zip(words, labels, strict=True)
    ]
    config = BertConfig(
        vocab_size=1_000,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
    )
    timed = Timed()
    options: dict[str, Any] = {
        "model": BertForSequenceClassification(config),
        "args": TrainingArguments(
            output_dir="unused",
            per_device_train_batch_size=SIZE,
            num_train_epochs=EPOCHS,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        "train_dataset": samples,
        "callbacks": [timed],
    }
    trainer = (
        SamestepTrainer(micro_batches=MICRO_BATCHES, **options)
        if IS_EXACT
        else Trainer(**options)
    )
    trainer.train()
    return timed.seconds if trainer.is_world_process_zero() else []


seconds = globals()[f"with_{LIBRARY}"]()
if seconds:
    print(json.dumps(seconds), flush=True)
