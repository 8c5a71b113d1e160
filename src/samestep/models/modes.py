"""The modes of a model and its modules, training or evaluation."""

import contextlib
from collections.abc import Iterator

from torch.nn import Module


@contextlib.contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Put the model into evaluation mode, and every module back into its own after it.

    `train` is called as well: a model may do more there than set modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train()
        for module, mode in modes:
            module.training = mode
