"""ATen operations whose results IEEE 754 fixes, however a library computes them."""

from typing import Any

import torch


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHAPING = _words(
    """empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full
    new_empty_strided"""
)
"""Operations that take only the shape and type of their argument."""

OVERWRITING = _words("fill zero copy uniform normal random bernoulli exponential")
"""Operations that overwrite what they are given, when in place."""

ELEMENTWISE = _words(
    """abs add ceil clamp clamp_max clamp_min clone complex conj copy copysign div fill
    floor floor_divide fmod frac hardtanh imag lift_fresh lift_fresh_copy masked_fill
    maximum minimum mul nan_to_num neg real reciprocal relu remainder round rsub sgn
    sign sub threshold _to_copy trunc where zero"""
)
"""One rounding of each element at most."""

MOVING = _words(
    """amax amin block_diag cat constant_pad_nd diag diag_embed diagonal_copy flip
    gather index index_copy index_fill index_put index_select masked_scatter
    masked_select max min reflection_pad1d reflection_pad2d repeat repeat_interleave
    roll scatter sort split stack take topk tril triu unbind"""
)
"""Operations that move elements."""

MAKING = _words("empty empty_strided eye full ones resize scalar_tensor set zeros")
"""Operations that make tensors."""

KNOWN = ELEMENTWISE | MOVING | MAKING | SHAPING

FUSED = _words("abs div mul reciprocal sgn")
"""Operations that round several times if numbers are complex, or fuse that."""

CHOOSING = _words(
    """amax amin clamp clamp_max clamp_min hardtanh max maximum min minimum relu
    threshold"""
)
"""Operations that take either of two zeros: x86 the second, ARM by its sign."""


def is_exact(func: Any, base: str, args: Any, kwargs: Any, result: Any) -> bool:
    """Return whether every correct library gives the same bits.

    `base` is the operation's name without `aten::` and the `_` of those in place.
    """
    results = result if isinstance(result, tuple | list) else (result,)
    if not any(
        t.is_floating_point() or t.is_complex() for t in results if torch.is_tensor(t)
    ):
        return True  # integers, truth values, and numbers that leave torch
    if base in ("add", "sub", "rsub"):
        return bool(kwargs.get("alpha", 1) == 1)
    if base in FUSED and any(t.is_complex() for t in args if torch.is_tensor(t)):
        return False
    if base == "index_put" and (*args, kwargs.get("accumulate", False))[3]:
        return False
    if "reduce" in kwargs:  # scatter
        return False
    if base in ("mm", "bmm"):  # sums of one term
        return bool(args[0].shape[-1] == 1)
    is_view = func.is_view or torch.Tag.inplace_view in func.tags
    return is_view or base in KNOWN
