"""What a pass through the user's model must leave as it is, watched in every pass.

A pass may change the buffers that are averaged over micro-batches (`state.flat`), in
place. Anything else that it changes (a frozen parameter, a buffer of another kind, a
parameter that is trained) is neither reset, averaged nor saved, so the result would
depend on which worker computed which micro-batches.

To look whether a tensor is the same object, in the same memory, of the same version
takes 0.2 us; its content is only read where one of them has changed. Writes through
`.data` into the same memory are not seen: the probe (`verification.probe`) finds them.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samestep.errors import NotReproducible
from samestep.state.flat import Flat


@dataclass
class _Watched:
    """One parameter or buffer, as it was."""

    name: str
    owner: dict[str, Any]
    """The module's parameters or buffers, by their own names."""
    key: str
    may_write: bool
    """Whether a pass may write into it."""
    is_constant: bool
    """Whether its content stays: between two steps, too."""
    tensor: Tensor | None = None
    version: int = -1
    address: int = 0
    sha256: bytes = b""

    def note(self) -> None:
        """Take the tensor as it is now for what it must stay."""
        tensor = self.owner.get(self.key)
        if self._is_untouched(tensor):
            return
        self.tensor = tensor
        if tensor is not None:
            self.version, self.address = tensor._version, tensor.data_ptr()
        if self.is_constant:
            self.sha256 = _content(tensor)

    def is_same(self) -> bool:
        """Whether nothing has touched it, or its content has stayed at least."""
        tensor = self.owner.get(self.key)
        if self._is_untouched(tensor):
            return True
        if not self.is_constant or _content(tensor) != self.sha256:
            return False
        self.note()
        return True

    def _is_untouched(self, tensor: Tensor | None) -> bool:
        if tensor is None or tensor is not self.tensor:
            return tensor is self.tensor
        return tensor.data_ptr() == self.address and (
            self.may_write or tensor._version == self.version
        )


class MutationCheck:
    """Watches the tensors of one model."""

    def __init__(self, model: nn.Module, flat: Flat, who: str) -> None:
        """Watch from now on; `flat` knows what a pass may change, `who` the model."""
        self._who, self._flat = who, flat
        self._watched = list(_watched(model, flat))
        self.note()

    def note(self) -> None:
        """Take everything as it is now, as between two steps of a user's own loop."""
        for each in self._watched:
            each.note()

    def check(self, passes: int = 1) -> None:
        """After a pass, or after none. Raises NotReproducible."""
        for each in self._watched:
            if not each.is_same():
                raise NotReproducible(_message(each, self._who))
        self._flat.check_counts(passes)


def _watched(model: nn.Module, flat: Flat) -> Iterable[_Watched]:
    trained = {id(p) for p in flat.parameters}
    moving = {id(b) for b in flat.moving}
    for prefix, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                name = f"{prefix}.{key}" if prefix else key
                is_moving = id(tensor) in moving
                is_constant = not is_moving and id(tensor) not in trained
                yield _Watched(name, owner, key, is_moving, is_constant)


def _message(each: _Watched, who: str) -> str:
    if each.may_write:
        return (
            "A buffer is changed in place, so that it can be averaged over "
            f"micro-batches; a pass through {who} replaced `{each.name}` by another "
            f"tensor. Use `self.{each.key}.copy_(...)`."
        )
    if not each.is_constant:
        return (
            "Parameters change in the optimizer's step only, or workers would compute "
            f"with different ones; a pass through {who} changed `{each.name}`. Compute "
            "with a changed copy instead."
        )
    kind = "frozen parameter" if isinstance(each.tensor, nn.Parameter) else "buffer"
    return (
        "What a pass changes must be a persistent buffer of the parameters' type which "
        "the first pass changes, too, so that it is averaged over micro-batches and "
        f"kept in checkpoints; a pass through {who} changed the {kind} `{each.name}`. "
        "Make it such a buffer (`register_buffer`), or leave it as it is."
    )


def _content(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return b""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().data).digest()
