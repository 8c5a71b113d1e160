"""One worker of `run.py --loop`: trains modules, one after the other, with a loop."""

import importlib
import json
import os
import sys
import warnings

import modules
import torch
from table import ZOO, Entry
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import samestep
from samestep.errors import SamestepError


def find(name: str) -> object:
    """`module:function` -> what the function returns."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)()


def loss_of(entry: Entry, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean."""
    if entry.loss:
        return -outputs.mean()
    if targets.dtype.is_floating_point:
        return functional.mse_loss(outputs, targets)
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def trained(entry: Entry) -> str:
    """The fingerprint after two epochs."""
    torch.manual_seed(0)
    model = find(entry.build)
    assert isinstance(model, nn.Module)
    data = TensorDataset(*getattr(modules, entry.data)()["train"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    loop = samestep.Loop(model.train(), micro_batches=5)
    for epoch in range(2):
        for step in loop.steps(data, 18, epoch):
            for inputs, targets in step:
                loss_of(entry, model(inputs), targets).backward()
            optimizer.step()
    return loop.fingerprint()


def main() -> None:
    """Rank 0 prints one line of JSON for each module."""
    warnings.simplefilter("ignore")
    for name in sys.argv[1:]:
        try:
            end = trained(ZOO[name])
        except SamestepError as error:
            end = f"refused: {error}"
        if os.environ["RANK"] == "0":
            print(json.dumps({"name": name, "end": end}), flush=True)


if __name__ == "__main__":
    main()
