"""What a micro-batch may change while others are suspended, and must not see."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from samestep.lightning.coroutine import Coroutine
from samestep.lightning.metrics import Metrics


class Request(NamedTuple):
    """Where a micro-batch is suspended: all wait there for each other."""

    what: str
    number: int = 0
    """Which optimizer or scheduler."""
    arguments: str = ""


END = Request("the end")


class State:
    """Which parts of a module are trained, its buffers, and the default type.

    The versions of buffers are kept, too: a backward pass compares them with those in
    its forward pass, which other micro-batches have changed in the meantime.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the state that the module has now."""
        self._module: Any = module
        self._modules = list(module.modules())
        self._parameters = list(module.parameters())
        self._buffers = tuple(module.buffers())
        self.take()

    def take(self) -> None:
        """Take the state that the module has now for this one."""
        self._modes = [module.training for module in self._modules]
        self._requires_grad = [p.requires_grad for p in self._parameters]
        self._toggled = self._module._param_requires_grad_state
        self._dtype = torch.get_default_dtype()
        self.take_buffers()

    def take_buffers(self) -> None:
        """Take the buffers only."""
        self._values = [buffer.detach().clone() for buffer in self._buffers]
        self._versions = tuple(buffer._version for buffer in self._buffers)

    def give(self) -> None:
        """Give the module this state."""
        for module, mode in zip(self._modules, self._modes, strict=True):
            module.training = mode
        for parameter, flag in zip(self._parameters, self._requires_grad, strict=True):
            parameter.requires_grad = flag
        self._module._param_requires_grad_state = self._toggled
        torch.set_default_dtype(self._dtype)
        for buffer, value in zip(self._buffers, self._values, strict=True):
            buffer.data.copy_(value)
        torch._C._autograd._unsafe_set_version_counter(self._buffers, self._versions)


class Turn:
    """One micro-batch that is suspended, and what it has seen."""

    def __init__(
        self, module: nn.Module, metrics: Metrics, compute: Callable[[], Any]
    ) -> None:
        """Begin with the state and the random generators of now."""
        self._coroutine = Coroutine(compute)
        self._state, self._metrics = State(module), metrics
        self.seen = metrics.read()
        """By the metrics."""
        self._take_generators()
        self.request = END

    def give(self) -> None:
        """Give the module and the generators what this micro-batch has left."""
        self._state.give()
        self._metrics.write(self.seen)
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)

    def run(self) -> None:
        """Run on to where it is suspended next."""
        self.request = self._coroutine.resume() or END
        self._state.take()
        self.seen = self._metrics.read()
        self._metrics.reset()
        self._take_generators()

    def _take_generators(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy = np.random.get_state(legacy=False)

    def suspend(self, request: Request) -> None:
        """Wait for the other micro-batches: called by what is computed."""
        self._coroutine.suspend(request)

    def close(self) -> None:
        """Give it up, if it is suspended."""
        self._coroutine.close()
