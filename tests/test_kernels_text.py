"""Models of tokens as programs: their gradients, and what is refused."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.core import tree
from samestep.kernels.execution import Execution
from samestep.kernels.interface import OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.program import Program
from samestep.kernels.values import (
    LossOp,
)
from samestep.portable import inputs
from samestep.portable.passes import places_of
from samestep.state.flat import Flat


LOSS = LossOp(OpKind.CROSS_ENTROPY, smoothing=0.1)
LENGTH, TOKENS, WIDTH = 9, 13, 12


class Decoder(nn.Module):
    """Attention in three layouts of queries, keys and values."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.embed = nn.Embedding(TOKENS, WIDTH, padding_idx=3)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.parts = nn.Linear(WIDTH, 3 * WIDTH)
        self.project, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits [b, t, tokens]."""
        hidden = self.embed(tokens) + self.position[: tokens.shape[1]]
        out: Tensor = self.head(hidden + self.project(self.attend(hidden)))
        return out

    def attend(self, hidden: Tensor) -> Tensor:
        b, t, _ = hidden.shape
        if self.layout == "together":
            split = self.parts(hidden).view(b, t, 3, 2, -1)
            q, k, v = split.permute(2, 0, 3, 1, 4)
        elif self.layout == "same":  # queries are keys and values, too
            x = self.parts(hidden)[..., :WIDTH]
            q = k = v = x.reshape(b, t, 2, -1).transpose(1, 2)
        else:
            q, k, v = self.parts(hidden).chunk(3, dim=-1)
            q, k, v = (x.view(b, t, 3, -1).transpose(1, 2) for x in (q, k, v))
        causal, scale = self.layout == "together", 0.3 * (self.layout == "apart")
        y = functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale or None
        )
        return y.transpose(1, 2).reshape(b, t, -1)


def program_of(model: nn.Module, backward: bool = True) -> Program:
    places = places_of(Flat(model))
    return lower(model, (LENGTH,), places, LOSS, backward, torch.int64)


def gradients(
    model: nn.Module, tokens: Tensor, labels: Tensor, sizes: Sequence[int]
) -> list[Tensor]:
    """Return the gradients of micro-batches of these sizes, computed by kernels."""
    flat = Flat(model)
    vector, slot = torch.zeros(flat.size), torch.zeros(flat.size)
    flat.bind(vector, write=True)
    count = len(sizes)
    execution = Execution(program_of(model), load_kernels(), len(tokens), count)
    merges = [tree.num_merges(m, (0, count), count) for m in range(count)]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    execution.bind_micro_batches(starts, torch.tensor(merges))
    execution.bind_slots([slot], flat.size)
    execution.bind(parameters=vector)
    inputs.load_samples(execution, tokens, labels)
    execution.call.weight = 1 / labels.numel()
    execution.run()
    return flat.views(slot)


@pytest.mark.parametrize("layout", ["together", "apart", "same"])
@pytest.mark.parametrize("sizes", [[40], [7, 0, 40, 4]])
def test_gradients_of_a_decoder_are_those_of_float64(
    layout: str, sizes: list[int]
) -> None:
    torch.manual_seed(1)
    model = Decoder(layout)
    shape = (sum(sizes), LENGTH)
    tokens, labels = torch.randint(TOKENS, shape), torch.randint(TOKENS, shape)
    exact = Decoder(layout).double()
    exact.load_state_dict(model.state_dict())
    loss = functional.cross_entropy(
        exact(tokens).flatten(0, 1), labels.flatten(), label_smoothing=0.1
    )
    expected = torch.autograd.grad(loss, list(exact.parameters()))
    found = gradients(model, tokens, labels, sizes)
    for gradient, reference in zip(found, expected, strict=True):
        error = (gradient - reference).norm()
        assert error <= 1e-6 * reference.norm() + 1e-7


def test_what_is_cut_from_one_tensor_needs_no_copies() -> None:
    kinds = {op.kind for op in program_of(Decoder("together")).ops}
    assert OpKind.UNARY not in kinds
