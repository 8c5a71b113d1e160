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

MIXES = " of a sum over samples"
"""Follows the name of an operation that combines the samples of a micro-batch."""

NO_SUM = "a loss, count or metric that is no sum over samples"
MEAN = "a mean over the samples of a micro-batch"

INSTEAD: dict[str, str] = {
    NO_SUM: "`.sum()`, or `len(targets)`",
    MEAN: '`reduction="sum"`, or `.sum()`',
    "gelu": '`nn.GELU()` without `approximate="tanh"`',
    **dict.fromkeys(
        ("rand", "randn", "uniform", "normal", "exponential"),
        "random numbers of every sample, which are the first dimension, such as "
        "`torch.randn_like(x)`",
    ),
    "randint": "`torch.rand`, whose numbers are floats",
    "upsample_bicubic2d": '`mode="bilinear"`',
    "_upsample_bilinear2d_aa": "`antialias=False`",
    "linalg_householder_product": "`weight_norm`: orthogonal weights come from a "
    "factorization in every step, whose order of sums PyTorch does not define",
    "sort": "a pooling or a softmax",
    "topk": "a softmax; for the best k answers, "
    "`(x > x.gather(1, targets[:, None])).sum(1) < k`",
    "_fft_r2c": "a convolution",
    "_cdist_forward": "sums of squares, `((a - b) ** 2).sum(-1)`",
    "linalg_qr": "a parametrization of elementwise operations and products",
    "index_put": "`torch.where` with a mask",
    "max_pool3d_with_indices": "`max_pool2d` of slices",
    "lstm": "sequences of one length, with a mask, and no `proj_size`",
    "gru": "sequences of one length, with a mask",
    "rnn_tanh": "sequences of one length, with a mask",
    "nll_loss_forward": '`reduction="sum"` or `"none"`, and constant weights',
    "nll_loss2d_forward": '`reduction="sum"` or `"none"`, and constant weights',
    "_ctc_loss": "a loss of every position, such as cross-entropy of aligned labels",
    "native_dropout": "`nn.Dropout`",
    "as_strided": "`x = x + y` where a view is changed in place, as by `x += y`",
    "_weight_norm_interface": "norms of activations, such as LayerNorm",
}
"""By the name of an operation, without `aten::` and what follows a dot."""


REENTRANT = (
    "A recording asks for the gradients of parameters, as `torch.autograd.grad` does, "
    "and checkpoints of the reentrant kind give none: set `use_reentrant=False`."
)


def refusal(unknown: Sequence[tuple[str, str]]) -> str:
    """Return the message that names operations without a kernel, and who called them.

    Each has a line, with what could be used instead, where that is known.
    """
    places: dict[str, list[str]] = {}
    for op, where in dict.fromkeys(unknown):
        places.setdefault(op, []).append(where)
    parts = "".join(f"\n- {_part(op, where)}" for op, where in places.items())
    return (
        f"Portable arithmetic has no kernels for these operations:{parts}\n"
        'Use others, or set `arithmetic = "torch"`.'
    )


def _part(op: str, where: Sequence[str]) -> str:
    name = _name(op)
    several = f", and {len(where) - 3} more places" if len(where) > 3 else ""
    plain = op.removesuffix(MIXES)
    part = f"`{plain}` ({'; '.join(where[:3])}{several})"
    if plain != op:
        return (
            f"{part}, which combines the samples of a micro-batch, whose losses and "
            "metrics are only added: compute it for each sample, and sum last"
        )
    if name in DEPENDS_ON_DATA:
        return (
            f"{part}, by which the data decide what is computed, and a recording is of "
            "one way only: use `torch.where` or a mask"
        )
    return f"{part}: use {INSTEAD[name]}" if name in INSTEAD else part


def _name(op: str) -> str:
    name = op.removeprefix("aten.").split(".")[0]
    return name if name.startswith("__") else name.removesuffix("_")
