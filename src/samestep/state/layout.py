"""Where each tensor of a model lies in the flat vectors; needs no torch.

    vector  [ parameter | padding | parameter | padding | ... ][ buffer | buffer | ... ]
              <-------------- `size`, a multiple of BLOCK ---->  <------ `tail` ------>

The optimizer's states have the layout of the parameters. Padding is zero, and stays so:
its gradient is zero, so elementwise updates of a slice need not know where it lies.
"""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from samestep.core.ownership import pieces
from samestep.system.json_values import JsonObject


ALIGNMENT = 16
"""Parameters start at multiples of this number of elements: a cache line of float32."""
BLOCK = 1024
"""Slices of the vector are cut at multiples of this number of elements."""
AVERAGE, BEST = "ema", "best"
"""States that are weights: their moving average, those of the best epoch."""

Dtype = Literal["float32", "float64"]
"""The type of all vectors, by the name that numpy and torch have for it."""
Division = Literal["blocks", "aligned", "none"]
"""How workers divide an update: `blocks`, anywhere between two blocks; `aligned`, and
parameters begin at blocks; `none`, one worker of each machine updates everything."""
Floats = NDArray[np.float32] | NDArray[np.float64]
Extent = Annotated[int, Field(ge=0, lt=2**40)]


class Entry(BaseModel):
    """One tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    shape: tuple[Extent, ...] = Field(strict=False)

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


class Layout(BaseModel):
    """The tensors of one model and its optimizer, in order."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_by_name=True,
        serialize_by_alias=True,
    )

    parameters: tuple[Entry, ...] = Field(strict=False)
    buffers: tuple[Entry, ...] = Field((), strict=False)
    """Floating-point buffers, for example BatchNorm's running statistics."""
    counters: tuple[str, ...] = Field((), strict=False)
    """Names of integer buffers: scalars that count updates."""
    states: tuple[str, ...] = Field((), strict=False)
    """Names of the optimizer's state vectors, and of others of the same layout."""
    aliases: dict[str, str] = {}
    """Second names of tensors that are tied, and their first."""
    # In files this field has been called `whole` since Muon was added.
    unsharded: tuple[str, ...] = Field((), strict=False, alias="whole")
    """Parameters that one worker updates as a whole, not in slices: Muon's matrices."""
    division: Division = "blocks"
    """How workers divide the update of the parameters."""
    constants: tuple[str, ...] = Field((), strict=False)
    """Frozen parameters and buffers that no pass changes: in files, not in vectors."""
    constants_sha256: str = ""
    """Their fingerprint."""
    dtype: Dtype = "float32"
    """The type of every vector."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return np.dtype(self.dtype).itemsize

    @property
    def offsets(self) -> list[int]:
        """Where each parameter begins, and where the last one ends."""
        # A cut beside an unsharded parameter must be one between blocks, too.
        is_aligned = self.unsharded or self.division == "aligned"
        alignment = BLOCK if is_aligned else ALIGNMENT
        sizes = (_round_up(entry.numel, alignment) for entry in self.parameters)
        return [0, *accumulate(sizes)]

    @property
    def size(self) -> int:
        """Elements of a vector of parameters."""
        return _round_up(self.offsets[-1], BLOCK)

    @property
    def tail(self) -> int:
        """Elements of all buffers together."""
        return sum(entry.numel for entry in self.buffers)

    @property
    def kept_tail(self) -> int:
        """Elements of the buffers in a snapshot: also those of the best epoch."""
        return self.tail * (2 if BEST in self.states else 1)

    def slices(self, workers: int) -> list[tuple[int, int]]:
        """Return the part `[a, b)` of the vector that each worker updates.

        Cut at whole blocks, so that the norm of each block is one worker's to compute.
        """
        if self.division == "none":
            return [(0, self.size), *[(self.size, self.size)] * (workers - 1)]
        cuts = [BLOCK * cut for cut in pieces(self.size // BLOCK, workers)]
        return list(pairwise(map(self._align_to_unsharded, cuts)))

    def _align_to_unsharded(self, cut: int) -> int:
        """Return the nearest cut that is not within an unsharded parameter."""
        ends = pairwise(self.offsets)
        for entry, (first, end) in zip(self.parameters, ends, strict=True):
            if entry.name in self.unsharded and first < cut < end:
                return first if cut - first < end - cut else end
        return cut

    def parameter_views(self, vector: Floats) -> Iterator[tuple[str, Floats]]:
        """Yield each parameter's name and its part of a vector [size]."""
        for entry, start in zip(self.parameters, self.offsets, strict=False):
            yield entry.name, vector[start : start + entry.numel].reshape(entry.shape)

    def buffer_views(self, tail: Floats) -> Iterator[tuple[str, Floats]]:
        """Yield each buffer's name and its part of a tail [tail]."""
        starts = accumulate((entry.numel for entry in self.buffers), initial=0)
        for entry, start in zip(self.buffers, starts, strict=False):
            yield entry.name, tail[start : start + entry.numel].reshape(entry.shape)

    def to_dict(self) -> JsonObject:
        """Return plain JSON values."""
        return self.model_dump(mode="json")


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
