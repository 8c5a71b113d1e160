"""The model's parameters as views of one vector, and its buffers between the steps.

A vector of the layout (`state.layout`) also holds a gradient; what a forward pass made
of the buffers (BatchNorm's running statistics) is then its tail.

Every micro-batch of a step starts from the same buffers. Their values after the step
are the means over its micro-batches, summed in the tree as gradients are; so they do
not depend on which worker computes which micro-batch. Integer buffers count updates.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from samestep.errors import NotReproducible, OwnCodeError
from samestep.state import dtypes
from samestep.state.fingerprint import fingerprint
from samestep.state.layout import BLOCK, Division, Entry, Layout


COUNTER = "num_batches_tracked"
"""The name under which BatchNorm counts."""


class Flat:
    """The vectors of one model, all of the type of its trained parameters."""

    counters_may_rest = False
    """Whether a pass may leave an integer buffer as it is that other passes change."""

    def __init__(
        self,
        model: nn.Module,
        states: Sequence[str] = (),
        constant: AbstractSet[str] = frozenset(),
        unsharded: Sequence[str] = (),
        division: Division = "blocks",
    ) -> None:
        """Lay out the model; its tensors stay where they are until `bind`.

        `states` are the names of the optimizer's state vectors, `constant` those of
        buffers that no forward pass changes, `unsharded` those of parameters that one
        worker updates as a whole, `division` how workers divide an update.
        """
        state_dict = model.state_dict(keep_vars=True)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.dtype = next(iter(trained.values())).dtype
        changing = {
            name: buffer
            for name, buffer in model.named_buffers()
            if name in state_dict and name not in constant
        }
        buffers = {n: b for n, b in changing.items() if b.dtype == self.dtype}
        counters = {n: b for n, b in changing.items() if can_count(n, b)}
        self.constants, aliases = _rest(state_dict, trained | buffers | counters)
        """The entries of the state_dict that training does not change."""
        self.layout = Layout(
            aliases=aliases,
            constants=tuple(self.constants),
            constants_sha256=fingerprint(self.constants) if self.constants else "",
            parameters=tuple(_entry(*item) for item in trained.items()),
            buffers=tuple(_entry(*item) for item in buffers.items()),
            counters=tuple(counters),
            states=tuple(states),
            unsharded=tuple(unsharded),
            division=division,
            dtype=dtypes.NAMES[self.dtype],
        )
        self.size, self.tail = self.layout.size, self.layout.tail
        self.parameters = list(trained.values())
        self.device = self.parameters[0].device
        self._offsets = self.layout.offsets
        self._buffers, self._counters = list(buffers.values()), list(counters.values())
        self.moving = [*self._buffers, *self._counters]
        """Buffers that a pass may change."""
        self._saved = [buffer.clone() for buffer in self._buffers]
        self.counts = [int(counter) for counter in self._counters]
        # BatchNorm's own counters need no check.
        self._checked = [i for i, n in enumerate(counters) if not n.endswith(COUNTER)]

    def read_tail(self) -> Tensor:
        """Return what a micro-batch adds to the sums besides its gradient, [tail]."""
        return self.read_buffers()

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return one view per parameter, of its shape, of a vector [size] or longer."""
        return [
            vector[offset : offset + parameter.numel()].view_as(parameter)
            for offset, parameter in zip(self._offsets, self.parameters, strict=False)
        ]

    def gradients(self) -> list[Tensor]:
        """Return each parameter's gradient; zeros where the last pass gave none."""
        return [
            torch.zeros_like(p) if p.grad is None else dense(p.grad)
            for p in self.parameters
        ]

    def bind(self, vector: Tensor, write: bool) -> None:
        """Make the parameters views of a vector [size]; `write` them there first."""
        for parameter, view in zip(self.parameters, self.views(vector), strict=True):
            if write:
                view.copy_(parameter.data)
            parameter.data = view

    def read_buffers(self) -> Tensor:
        """Return the buffers as a forward pass left them, [tail]."""
        return self._joined(self._buffers)

    def saved_buffers(self) -> Tensor:
        """Return the buffers as they are between two steps, [tail]."""
        return self._joined(self._saved)

    def _joined(self, buffers: Sequence[Tensor]) -> Tensor:
        none = torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([none, *(buffer.view(-1) for buffer in buffers)])

    def restore_buffers(self) -> None:
        """Reset the buffers to before the step: every micro-batch starts from there."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(saved)
        for counter, count in zip(self._counters, self.counts, strict=True):
            counter.fill_(count)

    def check_counts(self, passes: int) -> None:
        """Raise NotReproducible if an integer buffer has not counted the passes."""
        for i in self._checked:
            added = int(self._counters[i]) - self.counts[i]
            if added != passes and (added or not self.counters_may_rest):
                raise NotReproducible(
                    "An integer buffer that changes counts passes: it grows by 1 in "
                    f"each. `{self.layout.counters[i]}` grew by {added} in {passes}. "
                    "Use a persistent buffer of floats, which is averaged."
                )

    def advance_buffers(self, total: Tensor, micro_batches: int, updates: int) -> None:
        """Set the buffers to the means of their sums over micro-batches [tail].

        Integers grow by `updates`.
        """
        if self.tail or self.counts:
            counts = [count + updates for count in self.counts]
            self.set_buffers(total / micro_batches, counts)

    def set_buffers(self, values: Tensor, counts: Sequence[int]) -> None:
        """Set the buffers [tail], and the integer ones, now and for the next step."""
        parts = torch.split(values, [saved.numel() for saved in self._saved])
        for saved, part in zip(self._saved, parts, strict=True):
            saved.copy_(part.view_as(saved))
        self.counts = list(counts)
        self.restore_buffers()


def _rest(
    state_dict: Mapping[str, Any], changing: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a state_dict that do not change, and second names.

    Raises OwnCodeError for what is no tensor.
    """
    first = {id(tensor): name for name, tensor in changing.items()}
    constants: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise OwnCodeError(
                "A model's state_dict holds tensors only, so that it can be stored "
                f"safely; `{name}` is an object {type(tensor).__name__}."
            )
        if id(tensor) not in first:
            first[id(tensor)] = name
            constants[name] = tensor.detach()
        elif first[id(tensor)] != name:
            aliases[name] = first[id(tensor)]
    return constants, aliases


def can_count(name: str, buffer: Tensor) -> bool:
    """Return whether it is an integer that counts updates rather than a constant."""
    is_integer = buffer.dtype in (torch.int64, torch.int32) and buffer.numel() == 1
    return name.endswith(COUNTER) or is_integer


def dense(gradient: Tensor) -> Tensor:
    """Return the gradient; a sparse one, of an embedding, with its zeros."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def block_norms(gradient: Tensor) -> Tensor:
    """Return the squared L2 norms of the blocks of a gradient [n]: float64 [n / BLOCK].

    n is a multiple of BLOCK.
    """
    blocks = gradient.view(-1, BLOCK).double()
    return (blocks * blocks).sum(dim=1)


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name=name, shape=tuple(tensor.shape))
