"""The check, in every pass, that the user's model changes nothing that it must not.

A pass may change the buffers that are averaged over micro-batches (`state.flat`), in
place. Anything else that it changes (a frozen parameter, a buffer of another kind, a
parameter that is trained) is neither reset, averaged nor saved, so the result would
depend on which worker computed which micro-batches.

Comparing a tensor's identity, address and version takes 0.2 us; its content is only
read if one of these has changed. Writes through `.data` into the same memory go
unnoticed here: the probe (`verification.probe`) finds them.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from samestep.config.recipe import Recipe
from samestep.errors import NotReproducible
from samestep.state.fingerprint import raw_bytes
from samestep.state.flat import Flat
from samestep.user_code.references import names, title


@dataclass
class _Watched:
    """A parameter or buffer, and its state when it was last noted."""

    name: str
    owner: dict[str, Any]
    """The module's own dictionary of parameters or buffers."""
    key: str
    may_write: bool
    """Whether a pass may write into it."""
    is_constant: bool
    """Whether its content stays the same, between two steps, too."""
    tensor: Tensor | None = None
    version: int = -1
    address: int = 0
    sha256: bytes = b""

    def note(self) -> None:
        """Record the tensor as it is now."""
        tensor = self.owner.get(self.key)
        if self._is_untouched(tensor):
            return
        self.tensor = tensor
        if tensor is not None:
            self.version, self.address = tensor._version, tensor.data_ptr()
        if self.is_constant:
            self.sha256 = _content(tensor)

    def is_same(self) -> bool:
        """Return whether it is untouched, or at least its content is the same."""
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
    """The check of one model."""

    def __init__(self, model: nn.Module, flat: Flat, who: str) -> None:
        """Record all tensors; `flat` knows what a pass may change.

        `who` names the model in messages.
        """
        self._who, self._flat = who, flat
        self._watched = list(_watched(model, flat))
        self.note()

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module, flat: Flat) -> "MutationCheck | None":
        """Return the check of the user's own model; built-in ones need none."""
        name = names(recipe).get("model")
        return None if name is None else cls(model, flat, title(name, "model"))

    def note(self) -> None:
        """Record all tensors as they are now, as between two steps of `Loop`."""
        for tensor in self._watched:
            tensor.note()

    def check(self, passes: int = 1) -> None:
        """Check all tensors after a number of `passes`. Raises NotReproducible."""
        for tensor in self._watched:
            if not tensor.is_same():
                raise NotReproducible(_message(tensor, self._who))
        self._flat.check_counts(passes)


def _watched(model: nn.Module, flat: Flat) -> Iterable[_Watched]:
    """Yield all parameters and buffers of a model."""
    trained = {id(p) for p in flat.parameters}
    moving = {id(b) for b in flat.moving}
    for prefix, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                name = f"{prefix}.{key}" if prefix else key
                is_moving = id(tensor) in moving
                is_constant = not is_moving and id(tensor) not in trained
                yield _Watched(name, owner, key, is_moving, is_constant)


def _message(watched: _Watched, who: str) -> str:
    if watched.may_write:
        return (
            "A buffer is changed in place, so that it can be averaged over "
            f"micro-batches; a pass through {who} replaced `{watched.name}` by another "
            f"tensor. Use `self.{watched.key}.copy_(...)`."
        )
    if not watched.is_constant:
        return (
            "Only the optimizer may change parameters, or workers would compute with "
            f"different ones; a pass through {who} changed `{watched.name}`. Compute "
            "with a changed copy instead."
        )
    kind = "frozen parameter" if isinstance(watched.tensor, nn.Parameter) else "buffer"
    return (
        "A pass may only change persistent buffers of the parameters' type, and those "
        "from the first pass on, so that they are averaged over micro-batches and kept "
        f"in checkpoints; a pass through {who} changed the {kind} `{watched.name}`. "
        "Make it such a buffer (`register_buffer`), or leave it unchanged."
    )


def _content(tensor: Tensor | None) -> bytes:
    """Return a SHA-256 of the values; empty without a tensor."""
    return b"" if tensor is None else hashlib.sha256(raw_bytes(tensor)).digest()
