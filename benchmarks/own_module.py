"""A module of a user's own beside a plain PyTorch loop: an autoencoder of gene counts.

    python benchmarks/own_module.py --rounds 5

The variational autoencoder is of scVI's kind: 1,200 genes, a hidden layer of 128 units
in encoder and decoder, 10 latent variables, a Poisson likelihood, batches of 128.
samestep trains it with portable arithmetic; the loop has the fused Adam and as many
threads as samestep has workers. Each round measures all of them, one after the other.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cleanup
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import samestep
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


GENES, HIDDEN, LATENT, BATCH, LR = 1_200, 128, 10, 128, 1e-3


class Autoencoder(nn.Module):
    """A variational autoencoder that returns the loss of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(GENES, HIDDEN), nn.ReLU())
        self.mean, self.spread = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, GENES)
        )

    def forward(self, counts: Tensor) -> Tensor:
        """Map counts [b, genes] to losses [b]."""
        hidden = self.encoder(torch.log1p(counts))
        mean, log_variance = self.mean(hidden), self.spread(hidden)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        library = counts.sum(1, keepdim=True)
        rates = functional.log_softmax(self.decoder(latent), -1) + torch.log(library)
        wrong = functional.poisson_nll_loss(rates, counts, reduction="none").sum(1)
        parts = mean.square() + log_variance.exp() - log_variance - 1
        return torch.as_tensor(wrong + 0.5 * parts.sum(1))


def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what the module has computed, and a metric."""
    return outputs, {"likelihood": -outputs.sum()}


def load(samples: int) -> Tensor:
    """Return counts [samples, genes] of ten kinds of cells, from a counter."""
    draw = np.random.Generator(np.random.Philox(key=1))
    kinds = draw.gamma(0.3, 2.0, (10, GENES))
    rates = kinds[draw.integers(10, size=samples)] * draw.gamma(5.0, 0.2, (samples, 1))
    return torch.from_numpy(draw.poisson(rates).astype(np.float32))


def plain(counts: Tensor, epochs: int, threads: int) -> float:
    """Train by a loop; return the median seconds of epochs after the first."""
    torch.set_num_threads(threads)
    model, seconds = Autoencoder(), []
    optimizer = torch.optim.Adam(model.parameters(), LR, fused=True)
    for _ in range(epochs):
        began = time.perf_counter()
        for rows in torch.split(torch.randperm(len(counts)), BATCH):
            optimizer.zero_grad()
            model(counts[rows]).mean().backward()
            optimizer.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def ours(counts: Tensor, epochs: int, workers: int, server: ForkServer) -> float:
    """Train by samestep; return the median seconds of epochs after the first."""
    with tempfile.TemporaryDirectory() as directory:
        run = samestep.train(
            model=Autoencoder,
            data={"train": (counts, counts[:, :1])},
            loss=loss,
            arithmetic="portable",
            epochs=epochs,
            global_batch=BATCH,
            micro_batches=4,
            optimizer={"name": "adam", "lr": LR},
            workers=workers,
            out=Path(directory) / "run",
            view=SilentView(),
            server=server,
        )
        return float(statistics.median(e["seconds"] for e in run.history[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=12_800)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    counts, epochs = load(arguments.samples), arguments.epochs
    found: dict[int, list[tuple[float, float]]] = {n: [] for n in arguments.workers}
    with ForkServer() as server:
        for _ in range(arguments.rounds):
            for workers, pairs in found.items():
                own = ours(counts, epochs, workers, server)
                pairs.append((own, plain(counts, epochs, workers)))
    print("epoch: workers, seconds, those of the loop, their ratio and its quartiles")
    for workers, pairs in found.items():
        own, other = (statistics.median(part) for part in zip(*pairs, strict=True))
        ratios = [theirs / mine for mine, theirs in pairs]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(
            f"{workers}  {own:.3f}  {other:.3f}  "
            f"{middle:.2f} ({low:.2f} to {high:.2f}), n={len(ratios)}"
        )


if __name__ == "__main__":
    cleanup.run(main)
