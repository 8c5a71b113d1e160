"""An optimizer of the user's own: a `torch.optim.Optimizer` on a part of the vectors.

If its update is elementwise, each worker updates its slice of the vector, as with the
built-in ones: the optimizer is built with whole parameters, which are then replaced by
their pieces in that slice, and so are their states. Otherwise one worker of each
machine updates everything (over `gloo` all of them do, with the same bits).

What it keeps between two steps is copied when a snapshot is taken
(`optim.kept_state`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samestep.core.plan import derive_seed
from samestep.errors import OwnCodeError
from samestep.optim.building import Definition, build_optimizer
from samestep.optim.kept_state import (
    Kept,
    Kinds,
    group_numbers,
    kind_of,
    number,
    rooms,
    set_group_numbers,
)
from samestep.optim.optimizer import gradient_hash, slice_hash
from samestep.state.hashing import NO_HASHES, StepHashes
from samestep.state.layout import Layout
from samestep.system.json_values import JsonObject
from samestep.user_code import seeding
from samestep.user_code.references import blaming


@dataclass(frozen=True)
class _Piece:
    """The part of a parameter that this worker updates."""

    shape: tuple[int, ...]
    """The shape of the whole parameter."""
    within: slice
    """Where the piece is in the parameter."""
    part: slice
    """Where it is in the slice of this worker."""
    place: Tensor
    """Its values in the vector; of the parameter's shape if all of it is here."""
    parameter: nn.Parameter
    """The same values, for the optimizer."""

    def cut(self, value: Any) -> Any:
        """Return what belongs to this piece of a value in the parameter's state."""
        if not isinstance(value, Tensor) or value.shape != self.shape or not self.shape:
            return value
        return value.reshape(-1)[self.within].view_as(self.place).clone()


class CustomOptimizer:
    """Update a slice of the parameters in place, with a learning rate for each step."""

    def __init__(
        self,
        made: Definition,
        vector: Tensor,
        owned: tuple[int, int],
        states: Sequence[Tensor] = (),
        place: int | None = None,
    ) -> None:
        """Build the optimizer for the parameters in `vector` [size].

        `owned` is this worker's slice of the vector, `states` are the state vectors
        over it, by the names of the layout, `place` is where it begins, None if it is
        not hashed. Raises OwnCodeError.
        """
        self._made, self._steps = made, 0
        self.hashes, self._place = NO_HASHES, place
        self._all = vector[slice(*owned)]
        # Another worker of this machine updates everything.
        self._is_idle = made.layout.division == "none" and owned[0] == owned[1]
        self._states = dict(zip(made.layout.states, states, strict=bool(states)))
        whole = [
            nn.Parameter(vector[start : start + entry.numel].view(entry.shape))
            for start, entry in zip(
                made.layout.offsets, made.layout.parameters, strict=False
            )
        ]
        self._optimizer = build_optimizer(made, whole)
        self._pieces = list(_pieces(made.layout, vector, owned))
        self._replace(whole)
        self._factors = [
            group["lr"] / made.recipe.lr for group in self._optimizer.param_groups
        ]

    def _replace(self, whole: Sequence[nn.Parameter]) -> None:
        """Let the optimizer hold this worker's pieces instead of whole parameters."""
        piece_of = dict[Tensor, _Piece](zip(whole, self._pieces, strict=True))
        for group in self._optimizer.param_groups:
            group["params"] = [piece_of[p].parameter for p in group["params"]]
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for parameter, kept in self._optimizer.state.items():
            piece = piece_of[parameter]
            state[piece.parameter] = {n: piece.cut(v) for n, v in kept.items()}
        self._optimizer.state = state

    def step(self, gradient: Tensor, lr: float) -> None:
        """Update the parameters with the gradient [n]. Raises OwnCodeError."""
        self._steps += 1
        if self._is_idle:
            return
        for piece in self._pieces:
            piece.parameter.grad = gradient[piece.part].view_as(piece.place)
        for group, factor in zip(
            self._optimizer.param_groups, self._factors, strict=True
        ):
            group["lr"] = lr * factor
        seeding.seed(derive_seed(self._made.seed, "optimizer", self._steps))
        before = gradient_hash(gradient, self._place)
        with blaming(f"the update of {self._made.who}"):
            self._optimizer.step()
        for piece in self._pieces:
            parameter, place = piece.parameter, piece.place
            parameter.grad = None
            if parameter.data_ptr() != place.data_ptr():  # `data` was replaced
                place.copy_(parameter.data)
                parameter.data = place
        self.hashes = StepHashes(before, slice_hash(self._all, self._place))

    def kinds(self) -> Kinds:
        """Return what the optimizer keeps for each parameter. Raises OwnCodeError."""
        state, who = self._optimizer.state, self._made.who
        known = {piece.parameter for piece in self._pieces}
        for other in state.keys() - known:
            raise OwnCodeError(
                "An optimizer keeps its state by parameter, so that it can be saved; "
                f"that of {who} has an entry for {type(other).__name__}."
            )
        return [
            {
                name: self._kind(piece, name, value)
                for name, value in state.get(piece.parameter, {}).items()
            }
            for piece in self._pieces
        ]

    def _kind(self, piece: _Piece, name: str, value: Any) -> Kept:
        kind = kind_of(value, name, self._made.who, piece.place.dtype)
        is_piece = kind.shape and kind.shape == tuple(piece.place.shape)
        return Kept(piece.shape, kind.dtype) if is_piece else kind

    def save(self) -> JsonObject:
        """Copy the state into its vectors; return what is kept as numbers.

        Raises OwnCodeError if the optimizer keeps other things than after its first
        step.
        """
        if not self._steps or self._is_idle:
            return {}
        if list(self.kinds()) != list(self._made.kinds):
            raise OwnCodeError(
                "An optimizer keeps the same tensors and numbers from its first step "
                f"on, so that they can be saved; {self._made.who} keeps others after "
                f"step {self._steps}. Create its whole state in the first step."
            )
        numbers = []
        for piece, kinds in zip(self._pieces, self._made.kinds, strict=True):
            kept = self._optimizer.state.get(piece.parameter, {})
            numbers.append({n: number(kept[n]) for n in kinds if not kinds[n].shape})
            for name in kinds.keys() - numbers[-1].keys():
                values = kept[name].reshape(-1)
                for room, chunk in rooms(self._states, name, piece.part, values):
                    room.copy_(chunk)
        groups = group_numbers(self._optimizer.param_groups)
        return {"parameters": numbers, "groups": groups}

    def resume(self, rates: Iterable[float], steps: int) -> None:
        """Go on after `steps` steps, whose states have been restored."""
        self._steps = steps

    def restore(self, numbers: JsonObject) -> None:
        """Take the state from its vectors, and from what `save` has returned."""
        if not numbers or self._is_idle:
            return
        for piece, kinds, own in zip(
            self._pieces, self._made.kinds, numbers["parameters"], strict=True
        ):
            self._optimizer.state[piece.parameter] = {
                name: self._restored(piece, name, kind, own.get(name))
                for name, kind in kinds.items()
            }
        set_group_numbers(self._optimizer.param_groups, numbers["groups"])

    def _restored(self, piece: _Piece, name: str, kind: Kept, value: Any) -> Any:
        if not kind.shape:
            is_plain = kind.dtype is None
            return value if is_plain else torch.tensor(value, dtype=kind.dtype)
        shape = piece.place.shape if kind.shape == piece.shape else kind.shape
        values = torch.empty(shape, dtype=kind.dtype, device=piece.place.device)
        for room, chunk in rooms(self._states, name, piece.part, values.view(-1)):
            chunk.copy_(room)
        return values


def _pieces(layout: Layout, vector: Tensor, owned: tuple[int, int]) -> Iterator[_Piece]:
    """Yield the piece of each parameter in a worker's slice, perhaps empty."""
    for start, entry in zip(layout.offsets, layout.parameters, strict=False):
        end = start + entry.numel
        first = min(max(start, owned[0]), end)
        last = max(min(end, owned[1]), first)
        place = vector[first:last]
        if last - first == entry.numel:
            place = place.view(entry.shape)
        yield _Piece(
            entry.shape,
            slice(first - start, last - start),
            slice(first - owned[0], last - owned[0]),
            place,
            nn.Parameter(place),
        )
