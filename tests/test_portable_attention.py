"""Attention of own modules with portable arithmetic: masks and groups of heads."""

import pytest
import torch
from attention_styles import CLASSES, STYLES, TOKENS, pixels
from conftest import Own, Train
from module_styles import Called
from torch import nn

from samestep.config.model import CrossEntropy
from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.values import LossOp
from samestep.models.objective import Objective
from samestep.portable.passes import places_of
from samestep.state.flat import Flat
from samestep.verification.beside_torch import BesideTorch


LOSS = LossOp(OpKind.CROSS_ENTROPY)


def check(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Compare gradients with PyTorch's, in float64 where they differ; and evaluate."""
    flat = Flat(model, constant={name for name, _ in model.named_buffers()})
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    program = lower(model, shape, places_of(flat), LOSS)
    beside = BesideTorch(
        program, Objective(model, CrossEntropy()), flat, vector, load_kernels(), 7
    )
    beside.check(torch.randn(21, *shape), torch.randint(CLASSES, (21,)))
    lower(model.eval(), shape, places_of(flat), LOSS, backward=False)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_attention_of_many_styles_has_the_gradients_of_torch(style: str) -> None:
    torch.manual_seed(0)
    check(STYLES[style](), TOKENS)


def test_positions_that_are_no_single_axis_are_copied() -> None:
    torch.manual_seed(0)
    model = Called(pixels, a=nn.Conv2d(3, 4, 3), c=nn.Linear(4, CLASSES))
    check(model, (3, 8, 8))


def test_a_mask_is_part_of_the_kernel() -> None:
    model = STYLES["padding and causal"]()
    program = lower(model, TOKENS, places_of(Flat(model)), LOSS)
    kinds = (OpKind.ATTENTION, OpKind.ATTENTION_GRAD)
    found = [op for op in program.ops if op.kind in kinds]
    assert [op.kind for op in found] == list(kinds)
    assert all(op.flags & OpFlag.MASKED for op in found)


MASKED = """
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.words, self.last = nn.Embedding(9, 8), nn.Linear(8, classes)
        self.bias = nn.Parameter(torch.randn(2, 4, 4))
        self.first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)

    def forward(self, ids):
        x = self.words(ids)
        q = x.unflatten(2, (2, 4)).transpose(1, 2)
        mask = (x[..., 0] > 0)[:, None, None] | torch.eye(4).bool()
        y = functional.scaled_dot_product_attention(q, q, q, mask)
        y = y + functional.scaled_dot_product_attention(q, q, q, self.bias, 0.2)
        x = x + y.transpose(1, 2).flatten(2)
        x = self.first(x.transpose(0, 1), src_key_padding_mask=x[..., 1] < -1)
        return self.last(x.mean(0))

def build(outputs):
    return Net(outputs)

def load():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(9, (90, 4), generator=generator), torch.arange(90) % 3
"""


def test_masks_and_dropout_have_one_fingerprint_at_any_number_of_workers(
    train: Train, own: Own
) -> None:
    recipe = own(MASKED, arithmetic="portable")
    alone = train(recipe, 1)
    for workers, exchange in ((2, "shared"), (3, "gloo")):
        run = train(recipe, workers, exchange=exchange)
        assert run.weights_sha256 == alone.weights_sha256
