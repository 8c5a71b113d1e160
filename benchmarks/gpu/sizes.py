"""How large everything is: on a GPU, and in a dry run on the CPU."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samestep import Recipe


DOCS = Path(__file__).parents[2] / "docs"
SMALL: dict[str, dict[str, Any]] = {
    "mnist-mlp": {"model.hidden": [32, 16]},
    "mnist-cnn": {"model.channels": [4, 4], "model.hidden": [16]},
    "mnist-rnn": {"model.hidden": 16},
    "mnist-vit": {"model.width": 16, "model.depth": 1, "model.heads": 2},
    "chars-transformer": {"model.width": 16, "model.depth": 1, "data.context": 32},
}
"""Models for a dry run."""


@dataclass(frozen=True)
class Sizes:
    """The sizes on one device."""

    device: str
    steps: int = 60
    """Those of a training whose bits are compared."""
    samples: int | None = None
    """Training images of a timed epoch; None: all."""
    batches: tuple[int, ...] = (512, 4096)
    epochs: int = 4
    """The first one, in which much is done once, is not timed."""
    profiled: int = 50
    """Steps of a profile."""
    side: int = 4096
    """Of the square matrices of a timed product."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def on(cls, device: str) -> "Sizes":
        """Return the sizes on `cuda`, or on `cpu` those of a dry run."""
        if device == "cuda":
            return cls(device)
        return cls(device, 12, 256, (64, 100), 3, 5, 256, SMALL)

    def short(self, name: str) -> Recipe:
        """Return a built-in recipe as a short training of few samples."""
        data: dict[str, Any] = {"data.train_samples": 20 * 64}
        if name == "chars-transformer":
            data = {"data.path": str(DOCS), "data.pattern": "*.md"}
        fields = {"arithmetic": "torch", "epochs": None, "max_steps": self.steps}
        batch = {"global_batch": 64, "micro_batches": 4}
        return Recipe.load(name, fields | batch | data | self.models.get(name, {}))

    def timed(self, name: str, batch: int, micro_batches: int = 1) -> Recipe:
        """Return a built-in recipe of whole epochs, or of some samples of each."""
        fields: dict[str, Any] = {"arithmetic": "torch", "epochs": self.epochs}
        fields |= {"global_batch": batch, "micro_batches": micro_batches}
        if self.samples:
            fields["data.train_samples"] = self.samples
        return Recipe.load(name, fields | self.models.get(name, {}))
