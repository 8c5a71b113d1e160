"""What all peers share: the recipe's numbers, the data in memory, the report."""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from samestep import models
from samestep.config.model import CnnModel, CrossEntropy, MlpModel, TransformerModel
from samestep.config.optimizer import AdamRecipe, AdamWRecipe
from samestep.config.recipe import Recipe
from samestep.core.lr_schedule import learning_rate
from samestep.data.dataset import Dataset, load
from samestep.data.sources import mnist
from samestep.data.splits import Split


@dataclass(frozen=True)
class Task:
    """A recipe with its training and test samples, as tensors in memory.

    Images are normalised float32, [n, c, h, w], and for the family `mlp` [n, pixels].
    """

    recipe: Recipe
    epochs: int
    threads: int
    data: Dataset
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train[1]) // self.recipe.global_batch)

    def model(self) -> nn.Module:
        """Return the network, built from torch's own layers.

        Other families, those with batch norm, and with PEERS_MODEL=recipe all of them,
        are the recipe's own.
        """
        torch.manual_seed(self.recipe.seed)
        recipe = self.recipe.model
        if os.environ.get("PEERS_MODEL") != "recipe":
            if isinstance(recipe, MlpModel) and recipe.norm == "none":
                return mlp(recipe)
            if isinstance(recipe, CnnModel) and recipe.norm == "none":
                return cnn(recipe, self.train[0][:1])
            if isinstance(recipe, TransformerModel):
                return Decoder(recipe, self.data)
        return models.build(recipe, self.data)

    def criterion(self) -> Callable[..., Any]:
        loss = self.recipe.loss
        assert isinstance(loss, CrossEntropy)
        criterion = nn.CrossEntropyLoss(label_smoothing=loss.label_smoothing)
        if self.data.task == "next-token":
            return lambda logits, targets: criterion(
                logits.flatten(0, 1), targets.flatten()
            )
        return criterion

    def clip(self, model: nn.Module) -> None:
        """Clip gradients, if the recipe says so."""
        if self.recipe.optimizer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(
                model.parameters(), self.recipe.optimizer.max_grad_norm
            )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        recipe = self.recipe.optimizer
        assert isinstance(recipe, AdamRecipe | AdamWRecipe)
        kinds: dict[str, type[torch.optim.Adam]]
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        kind = kinds[recipe.name]
        return kind(
            model.parameters(),
            recipe.lr,
            recipe.betas,
            recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def learning_rate(self, step: int) -> float:
        recipe = self.recipe
        return learning_rate(
            recipe.schedule,
            recipe.optimizer.lr,
            step,
            self.steps_per_epoch,
            self.epochs * self.steps_per_epoch,
        )


def mlp(recipe: MlpModel) -> nn.Module:
    """[b, 784] -> logits [b, 10]."""
    widths = (math.prod(mnist.SHAPE), *recipe.hidden, mnist.NUM_CLASSES)
    return nn.Sequential(*linears(widths, recipe.dropout))


def cnn(recipe: CnnModel, sample: Tensor) -> nn.Module:
    """Images like `sample` [1, c, h, w] -> logits [b, 10]."""
    stages: list[nn.Module] = []
    channels = (sample.shape[1], *recipe.channels)
    for ends, kernel in zip(pairwise(channels), recipe.kernels, strict=True):
        stages += [nn.Conv2d(*ends, kernel), nn.ReLU(), nn.MaxPool2d(2)]
    stages.append(nn.Flatten())
    features = nn.Sequential(*stages)(sample).shape[1]
    widths = (features, *recipe.hidden, mnist.NUM_CLASSES)
    return nn.Sequential(*stages, *linears(widths, recipe.dropout))


class Decoder(nn.Module):
    """Tokens [b, t] -> logits [b, t, tokens], each from those before it."""

    def __init__(self, recipe: TransformerModel, data: Dataset) -> None:
        super().__init__()
        (context,), width = data.inputs, recipe.width
        self.embed = nn.Embedding(data.outputs, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        block = nn.TransformerEncoderLayer(
            width,
            recipe.heads,
            4 * width,
            recipe.dropout,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, recipe.depth, norm, False)
        self.head = nn.Linear(width, data.outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = self.embed(tokens) + self.position[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        logits: Tensor = self.head(self.blocks(hidden, mask, is_causal=True))
        return logits


def linears(widths: Sequence[int], dropout: float) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return layers[: -2 if dropout else -1]


def task() -> Task:
    """Read the command line: RECIPE EPOCHS THREADS."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("epochs", type=int)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe)
    torch.set_num_threads(arguments.threads)
    data = load(recipe.data)
    parts = [in_memory(recipe, data.splits[name]) for name in ("train", "test")]
    return Task(recipe, arguments.epochs, arguments.threads, data, *parts)


def in_memory(recipe: Recipe, split: Split) -> tuple[Tensor, Tensor]:
    """Return all inputs and targets of a split."""
    inputs, targets = split.gather(torch.arange(len(split)))
    return inputs.flatten(1) if recipe.model.family == "mlp" else inputs, targets


def run(
    task: Task, model: nn.Module, epoch: Callable[[int], None], reports: bool = True
) -> None:
    """Time each epoch, then report."""
    seconds = []
    for index in range(task.epochs):
        start = time.perf_counter()
        epoch(index)
        seconds.append(time.perf_counter() - start)
    if reports:
        tell(task, model, seconds)


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the sorted shapes of all parameters: equal for equal networks."""
    return sorted(tuple(parameter.shape) for parameter in model.parameters())


def tell(task: Task, model: nn.Module, epoch_seconds: list[float]) -> None:
    """Measure the test accuracy; print it and the epochs' times."""
    model.eval()
    with torch.inference_mode():
        batches = zip(*(torch.split(part, 250) for part in task.test), strict=True)
        right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in batches)
    report(epoch_seconds, right / task.test[1].numel(), shapes(model))


def report(
    epoch_seconds: list[float], test_accuracy: float, shapes: list[tuple[int, ...]]
) -> None:
    """Print what compare.py reads: one line of JSON."""
    record = {
        "epoch_seconds": epoch_seconds,
        "test_accuracy": test_accuracy,
        "shapes": shapes,
    }
    print(json.dumps(record))
