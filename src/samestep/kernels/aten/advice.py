"""What to use instead of operations that have no kernel."""

from collections.abc import Sequence


DEPENDS_ON_DATA = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "equal",
)
"""Operations by which values decide what is computed next, or how much."""

INSTEAD: dict[str, str] = {
    "gelu": '`nn.GELU()` without `approximate="tanh"`',
    "cumsum": "a product with a triangular matrix of ones",
    "upsample_nearest2d": "`repeat_interleave`, or a transposed convolution",
    "upsample_bilinear2d": "a transposed convolution",
    "sort": "a pooling or a softmax",
    "topk": "a softmax",
    "_fft_r2c": "a convolution",
    "_cdist_forward": "sums of squares, `((a - b) ** 2).sum(-1)`",
    "linalg_qr": "a parametrization of elementwise operations and products",
    "index_put": "`torch.where` with a mask",
    "max_pool3d_with_indices": "`max_pool2d` of slices",
    "lstm": "sequences of one length, with a mask, and no `proj_size`",
    "gru": "sequences of one length, with a mask",
    "rnn_tanh": "sequences of one length, with a mask",
    "native_dropout": "`nn.Dropout`",
    "random numbers of Python or NumPy": "those of torch",
}
"""By the name of an operation, without `aten::` and what follows a dot."""


def refusal(unknown: Sequence[tuple[str, str]]) -> str:
    """Return the message that names operations without a kernel, and who called them.

    Each is followed by what could be used instead, where that is known.
    """
    places: dict[str, list[str]] = {}
    for op, where in dict.fromkeys(unknown):
        places.setdefault(op, []).append(where)
    parts = [_part(op, where) for op, where in places.items()]
    return (
        f"Portable arithmetic has no kernels for these operations: {'; '.join(parts)}. "
        'Use others, or set `arithmetic = "torch"`.'
    )


def _part(op: str, where: Sequence[str]) -> str:
    name = _name(op)
    several = f", and {len(where) - 3} more places" if len(where) > 3 else ""
    part = f"`{op}` ({'; '.join(where[:3])}{several})"
    if name in DEPENDS_ON_DATA:
        return (
            f"{part}, by which the data decide what is computed, and a recording is of "
            "one way only: use `torch.where` or a mask"
        )
    return f"{part}: use {INSTEAD[name]}" if name in INSTEAD else part


def _name(op: str) -> str:
    name = op.removeprefix("aten.").split(".")[0]
    return name if name.startswith("__") else name.removesuffix("_")
