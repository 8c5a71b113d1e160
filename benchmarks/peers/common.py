"""What all peers share: the recipe's numbers, the data in memory, the report."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from samestep.data import mnist
from samestep.dataset import load
from samestep.ingredients import CrossEntropy, MlpModel
from samestep.optimizer_sections import SgdRecipe
from samestep.recipe import Recipe
from samestep.schedule import learning_rate


@dataclass(frozen=True)
class Task:
    """A recipe with its training and test samples as normalised float32 tensors."""

    recipe: Recipe
    epochs: int
    threads: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train[1]) // self.recipe.global_batch)

    def model(self) -> nn.Sequential:
        torch.manual_seed(self.recipe.seed)
        recipe = self.recipe.model
        assert isinstance(recipe, MlpModel)
        widths = (mnist.NUM_PIXELS, *recipe.hidden, mnist.NUM_CLASSES)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
            if recipe.dropout:
                layers.append(nn.Dropout(recipe.dropout))
        return nn.Sequential(*layers[: -2 if recipe.dropout else -1])

    def criterion(self) -> nn.CrossEntropyLoss:
        loss = self.recipe.loss
        assert isinstance(loss, CrossEntropy)
        return nn.CrossEntropyLoss(label_smoothing=loss.label_smoothing)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        recipe = self.recipe.optimizer
        assert not isinstance(recipe, SgdRecipe)
        kinds: dict[str, type[torch.optim.Adam]]
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        kind = kinds[recipe.name]
        return kind(
            model.parameters(),
            recipe.lr,
            recipe.betas,
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
            self.epochs,
        )


def task() -> Task:
    """From the command line: RECIPE EPOCHS THREADS."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("epochs", type=int)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe)
    torch.set_num_threads(arguments.threads)
    splits = load(recipe.data).splits
    train, test = (
        splits[name].gather(torch.arange(len(splits[name])))
        for name in ("train", "test")
    )
    return Task(recipe, arguments.epochs, arguments.threads, train, test)


def run(
    task: Task, model: nn.Module, epoch: Callable[[int], None], reports: bool = True
) -> None:
    """Times each epoch, measures the test accuracy, prints both as JSON."""
    seconds = []
    for index in range(task.epochs):
        start = time.perf_counter()
        epoch(index)
        seconds.append(time.perf_counter() - start)
    model.eval()
    with torch.inference_mode():
        inputs, targets = task.test
        accuracy = (model(inputs).argmax(1) == targets).float().mean().item()
    if reports:
        print(json.dumps({"epoch_seconds": seconds, "test_accuracy": accuracy}))
