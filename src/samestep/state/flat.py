"""The model's parameters as views of one vector, and its buffers between the steps.

A vector of the layout (`state.layout`) also holds a gradient; its tail then holds
what a forward pass made of the buffers (BatchNorm's running statistics).
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from samestep.errors import NotReproducible, OwnCodeError
from samestep.state import dtypes
from samestep.state.fingerprint import fingerprint
from samestep.state.layout import BLOCK, Entry, Layout


COUNTER = "num_batches_tracked"
"""The name under which BatchNorm counts."""


class Flat:
    """The vectors of one model, all of the type of its trained parameters."""

    def __init__(
        self,
        model: nn.Module,
        states: Sequence[str] = (),
        still: AbstractSet[str] | None = None,
        whole: Sequence[str] = (),
    ) -> None:
        """`states` are the names of the optimizer's state vectors; `still` those of
        buffers that no forward pass changes, None if that is unknown; `whole` those of
        parameters that one worker updates."""
        kept = model.state_dict(keep_vars=True)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.dtype = next(iter(named.values())).dtype
        moving = {
            n: b
            for n, b in model.named_buffers()
            if n in kept.keys() - (still or set())
        }
        buffers = {n: b for n, b in moving.items() if b.dtype == self.dtype}
        counters = {n: b for n, b in moving.items() if can_count(n, b)}
        self.constants, aliases = _rest(kept, {**named, **buffers, **counters})
        """Of the state_dict, what training does not change."""
        self.layout = Layout(
            aliases=aliases,
            constants=tuple(self.constants),
            constants_sha256=fingerprint(self.constants) if self.constants else "",
            parameters=tuple(_entry(*item) for item in named.items()),
            buffers=tuple(_entry(*item) for item in buffers.items()),
            counters=tuple(counters),
            states=tuple(states),
            whole=tuple(whole),
            dtype=dtypes.NAMES[self.dtype],
        )
        self.size, self.tail = self.layout.size, self.layout.tail
        self.parameters = list(named.values())
        self.device = self.parameters[0].device
        self._offsets = self.layout.offsets
        self._buffers, self._counters = list(buffers.values()), list(counters.values())
        self.moving = [*self._buffers, *self._counters]
        """What a pass may change."""
        self._saved = [buffer.clone() for buffer in self._buffers]
        self.counts = [int(counter) for counter in self._counters]
        self._may_rest = still is None
        self._own = [i for i, n in enumerate(counters) if not n.endswith(COUNTER)]
        self._counter_names = list(counters)

    def views(self, vector: Tensor) -> list[Tensor]:
        """[size + tail] or [size] -> one view per parameter, of its shape."""
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
        """Makes the parameters views of `vector` [size]; first writes them there."""
        for parameter, view in zip(self.parameters, self.views(vector), strict=True):
            if write:
                view.copy_(parameter.data)
            parameter.data = view

    def read_buffers(self) -> Tensor:
        """The buffers as a forward pass left them: [tail]."""
        return self._joined(self._buffers)

    def saved_buffers(self) -> Tensor:
        """The buffers between two steps: [tail]."""
        return self._joined(self._saved)

    def _joined(self, buffers: Sequence[Tensor]) -> Tensor:
        none = torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([none, *(buffer.view(-1) for buffer in buffers)])

    def restore_buffers(self) -> None:
        """To their values before the step: every micro-batch starts from these."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(saved)
        for counter, count in zip(self._counters, self.counts, strict=True):
            counter.fill_(count)

    def check_counts(self, passes: int) -> None:
        """Raises NotReproducible if an integer buffer has not counted the passes."""
        for i in self._own:
            added = int(self._counters[i]) - self.counts[i]
            if added != passes and (added or not self._may_rest):
                raise NotReproducible(
                    "An integer buffer that changes counts passes: it grows by 1 in "
                    f"each. `{self._counter_names[i]}` grew by {added} in {passes}. "
                    "Use a persistent buffer of floats, which is averaged."
                )

    def advance_buffers(self, total: Tensor, micro_batches: int, updates: int) -> None:
        """Sums over micro-batches [tail] -> their means; integers count `updates`."""
        if self.tail or self.counts:
            counts = [count + updates for count in self.counts]
            self.set_buffers(total / micro_batches, counts)

    def set_buffers(self, values: Tensor, counts: Sequence[int]) -> None:
        """[tail] and one number per integer buffer."""
        parts = torch.split(values, [saved.numel() for saved in self._saved])
        for saved, part in zip(self._saved, parts, strict=True):
            saved.copy_(part.view_as(saved))
        self.counts = list(counts)
        self.restore_buffers()

    def keep_buffers(self) -> None:
        """Their values now are those between two steps."""
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            saved.copy_(buffer)
        self.counts = [int(counter) for counter in self._counters]

    @property
    def num_changes(self) -> int:
        """The length of `read_changes`."""
        return 2 * self.tail + len(self.counts)

    def read_changes(self) -> Tensor:
        """[2 * tail + counters]: what a forward pass left.

        The buffers, where they are not as before (0 or 1), and what the integer buffers
        have counted.
        """
        now, before = self.read_buffers(), self.saved_buffers()
        counted = [
            int(counter) - count
            for counter, count in zip(self._counters, self.counts, strict=True)
        ]
        rest = (now != before), torch.tensor(counted)
        return torch.cat([now, *(each.to(self.dtype) for each in rest)])

    def apply_changes(self, total: Tensor, micro_batches: int) -> None:
        """Sums of `read_changes` over micro-batches -> the buffers after the step.

        Means, and what no pass has changed stays as it is, without rounding.
        """
        sums, changed, counted = torch.split(
            total, [self.tail, self.tail, len(self.counts)]
        )
        values = torch.where(changed > 0, sums / micro_batches, self.saved_buffers())
        more = zip(self.counts, counted.tolist(), strict=True)
        self.set_buffers(values, [count + int(added) for count, added in more])


def _rest(
    kept: Mapping[str, Any], held: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of a state_dict: the tensors that are not `held`, and second names of tensors."""
    first = {id(tensor): name for name, tensor in held.items()}
    constants: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in kept.items():
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
    """Whether it is an integer that counts updates rather than a constant."""
    is_integer = buffer.dtype in (torch.int64, torch.int32) and buffer.numel() == 1
    return name.endswith(COUNTER) or is_integer


def dense(gradient: Tensor) -> Tensor:
    """Return the gradient, that of a sparse embedding with its zeros."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def block_norms(gradient: Tensor) -> Tensor:
    """[n], n a multiple of BLOCK -> float64 [n / BLOCK], squared L2 norms of blocks."""
    blocks = gradient.view(-1, BLOCK).double()
    return (blocks * blocks).sum(dim=1)


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name=name, shape=tuple(tensor.shape))
