"""Initial weights from counters: for any module, the same on every processor."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from samestep import NotPortable
from samestep.core import splitmix
from samestep.core.plan import derive_seed
from samestep.kernels.library import VARIABLE, supported_isas
from samestep.portable import functions
from samestep.portable.initial import from_counters
from samestep.state.fingerprint import fingerprint


ZOO = "0060781a665bcd7fa39a9279fc7f3f0c288b76cfba2f2bfaa84eae88eae3e6cd"


class Zoo(nn.Module):
    """What libraries draw and compute when they are built."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(7, 5), nn.Conv2d(3, 4, 3)
        self.lstm, self.attention = nn.LSTM(6, 5, 2), nn.MultiheadAttention(8, 2)
        self.embed, self.norm = nn.Embedding(9, 6, padding_idx=0), nn.BatchNorm2d(4)
        self.token = nn.Parameter(0.02 * torch.randn(1, 8))
        self.order = nn.Buffer(torch.randperm(11))
        self.table = nn.Buffer(_sinusoids(10, 6))
        nn.init.trunc_normal_(self.linear.weight, std=0.1)
        nn.init.kaiming_normal_(self.conv.weight)
        nn.init.orthogonal_(self.lstm.all_weights[0][1])


def _sinusoids(length: int, width: int) -> Tensor:
    """Return position embeddings [length, width], as tutorials compute them."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length).unsqueeze(1) * rate
    table = torch.zeros(length, width)
    table[:, 0::2], table[:, 1::2] = torch.sin(angles), torch.cos(angles)
    return table


def built(seed: int = 1) -> Zoo:
    with from_counters(seed) as building:
        model = Zoo()
    building.check(model)
    return model


def test_any_module_has_the_same_weights_by_every_instruction_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    first = fingerprint(built().state_dict())
    assert first == ZOO
    torch.manual_seed(2)
    for isa in supported_isas():
        monkeypatch.setenv(VARIABLE, isa)
        assert fingerprint(built().state_dict()) == first
    assert fingerprint(built(seed=2).state_dict()) != first


def test_numbers_are_those_of_the_specification() -> None:
    with from_counters(5):
        uniform, normal = torch.empty(50).uniform_(-1, 3), torch.randn(2, 25)
    for place, key in enumerate(derive_seed(5, "model", k) for k in (0, 1)):
        for e, z in enumerate(splitmix.numbers(key, 50).tolist()):
            high, low = z >> 40, z >> 16 & 0xFFFFFF
            if place == 0:
                assert uniform[e] == high * 2**-24 * 4 - 1
                continue
            radius = math.sqrt(-2 * math.log((high + 1) * 2**-24))
            exact = radius * math.cos(2 * math.pi * low * 2**-24)
            assert normal.flatten()[e] == pytest.approx(exact, abs=2e-6)


def test_draws_have_their_distributions() -> None:
    size = 100_000
    with from_counters(3):
        normal, exponential = torch.randn(size) * 2, torch.empty(size).exponential_(4)
        kept = torch.full((size,), 0.3).bernoulli()
        integers = torch.randint(2, 6, (size,))
    assert normal.mean().abs() < 0.03
    assert (normal.std() - 2).abs() < 0.02
    assert (normal.pow(4).mean() / 16 - 3).abs() < 0.1
    assert (exponential.mean() - 0.25).abs() < 0.005
    assert exponential.min() > 0
    assert (kept.mean() - 0.3).abs() < 0.01
    assert set(integers.tolist()) == {2, 3, 4, 5}
    assert (integers.double().mean() - 3.5).abs() < 0.02


def test_functions_in_numpy_are_accurate() -> None:
    x = torch.cat([torch.linspace(-1, 1, 4_001), 1 - 2.0 ** -torch.arange(1, 25)])
    exact = torch.erfinv(x.double())
    inner = x.abs() < 1
    off = (functions.erfinv(x)[inner].double() / exact[inner] - 1).abs()
    assert off.nan_to_num().max() < 2**-23.9
    assert functions.erfinv(torch.tensor([1.0, -1.0])).tolist() == [
        math.inf,
        -math.inf,
    ]
    assert functions.erfinv(torch.tensor([1.5, math.nan])).isnan().all()
    for name in ("expm1", "atanh"):
        ours, torchs = getattr(functions, name), getattr(torch, name)
        found, exact = ours(x)[inner].double(), torchs(x.double())[inner]
        assert (found / exact - 1).nan_to_num().abs().max() < 2**-23.9
    assert functions.atanh(torch.tensor([1.0, -1.0])).tolist() == [math.inf, -math.inf]
    assert functions.expm1(torch.tensor([math.nan, 200.0]))[0].isnan()
    seeded = torch.Generator().manual_seed(0)
    base = torch.rand(5_000, generator=seeded) * 100
    index = torch.randn(5_000, generator=seeded) * 5
    exact = base.double() ** index.double()
    normal = exact > torch.finfo(torch.float32).tiny
    off = functions.power(base, index).double() / exact - 1
    assert off[normal].abs().max() < 2**-23
    for case in ((-2.0, 3.0), (0.0, 2.0), (0.0, -1.0), (-2.0, 0.5), (10.0, 2.0)):
        (ours,) = functions.power(*torch.tensor(case).view(2, 1))
        (torchs,) = torch.pow(*torch.tensor(case).view(2, 1))
        assert ours == torchs or (ours.isnan() and torchs.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_square_roots_are_rounded_correctly(dtype: torch.dtype) -> None:
    x = torch.linspace(1, 4, 10_001, dtype=dtype)
    with from_counters(1) as building:
        root = x.sqrt()
    building.check(nn.ParameterList([root]))
    # Rounded twice, first to doubles, a root of a float is still rounded correctly.
    exact = torch.tensor([math.sqrt(v) for v in x.tolist()], dtype=torch.float64)
    assert root.equal(exact.to(dtype))


def test_orthogonal_weights_are_orthogonal() -> None:
    with from_counters(1) as building:
        tall, wide = torch.empty(33, 20), torch.empty(20, 33)
        for matrix in (tall, wide):
            nn.init.orthogonal_(matrix)
    for matrix in (tall, wide.T):
        assert torch.allclose(matrix.T @ matrix, torch.eye(20), atol=1e-6)
    sample = torch.randn(9, 5)
    factors = functions.OTHERS["linalg_qr"](sample)
    assert torch.allclose(torch.mm(*factors), sample, atol=1e-6)
    building.check(nn.ParameterList([tall, wide]))


def test_weights_that_torch_computes_in_an_order_of_its_own_are_refused() -> None:
    with from_counters(1) as building:
        model = nn.Linear(4, 4)
        with torch.no_grad():
            model.weight.copy_(torch.randn(4, 9) @ torch.randn(9, 4))
    with pytest.raises(
        NotPortable,
        match=r"`weight`, computed by `aten.mm.default` .*"
        r"test_initial_weights.py:\d+",
    ):
        building.check(model)


COMPLEX = torch.complex(torch.tensor([1.1, 2.3]), torch.tensor([0.3, -0.7]))


@pytest.mark.parametrize(
    "compute",
    [
        lambda: (COMPLEX * COMPLEX).real,
        lambda: (COMPLEX / COMPLEX).real,
        lambda: COMPLEX.reciprocal().imag,
        lambda: COMPLEX.abs(),
        lambda: torch.zeros(3).index_put(
            (torch.tensor([1, 1]),), torch.tensor([0.1, 0.2]), accumulate=True
        ),
        lambda: torch.ones(3).scatter_(0, torch.tensor([1, 1]), 0.3, reduce="multiply"),
    ],
)
def test_what_processors_fuse_or_add_in_another_order_is_refused(
    compute: Callable[[], Tensor],
) -> None:
    with from_counters(1) as building:
        weight = compute()
    with pytest.raises(NotPortable, match="computed by `aten"):
        building.check(nn.ParameterList([weight]))


@pytest.mark.parametrize(
    "compute",
    [
        torch.maximum,
        torch.minimum,
        lambda a, b: torch.clamp(a, min=0) + torch.clamp(b, min=0) * -0.0,
        lambda a, b: torch.relu(torch.where(b > a, a, b)),
        lambda a, b: torch.stack([a, b]).amax(0),
        lambda a, b: torch.stack([a, b]).max(0).values,
    ],
)
@pytest.mark.parametrize("size", [1, 40])
def test_zeros_of_maxima_have_one_sign(
    compute: Callable[[Tensor, Tensor], Tensor], size: int
) -> None:
    """x86 takes the second of two zeros, ARM the positive one."""
    zeros = torch.zeros(size), -torch.zeros(size)
    for a, b in (zeros, zeros[::-1]):
        with from_counters(1):
            result = compute(a, b)
        assert not result.signbit().any()


def test_a_random_operation_without_a_portable_form_is_refused() -> None:
    with from_counters(1) as building:
        model = nn.Linear(4, 4)
        model.weight.data.cauchy_()
    with pytest.raises(NotPortable, match=r"aten\.cauchy_"):
        building.check(model)


def test_weights_that_are_drawn_again_are_portable() -> None:
    with from_counters(1) as building:
        model = nn.Linear(4, 4)
        model(torch.ones(3, 4))  # as a lazy module finds its shapes
        model.weight.data.cauchy_()
        model.reset_parameters()
    building.check(model)
