"""Models that look suspicious and are exact."""

import random

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.utils.checkpoint import checkpoint

from kinds.plain import CLASSES, HIDDEN, WIDTH, Net


class Double(torch.autograd.Function):
    """A gradient of one's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class OwnGradient(Net):
    def middle(self, h):
        return Double.apply(h)


class BufferInPlace(Net):
    """A running mean that `forward` keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(HIDDEN))

    def middle(self, h):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.mean


class BufferReassigned(BufferInPlace):
    def middle(self, h):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


def old_spectral_norm():
    net = Net()
    spectral_norm(net.body)
    return net


def new_spectral_norm():
    net = Net()
    parametrizations.spectral_norm(net.body)
    return net


def weight_norm():
    net = Net()
    parametrizations.weight_norm(net.body)
    return net


def orthogonal():
    net = Net()
    parametrizations.orthogonal(net.head)
    return net


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Parametrized(Net):
    """A parametrization of one's own, in its cache while `forward` runs."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        parametrize.register_parametrization(self.mix, "weight", Symmetric())

    def middle(self, h):
        with parametrize.cached():
            return self.mix(self.mix(h))


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(HIDDEN, HIDDEN)
        self.two = nn.Linear(HIDDEN, HIDDEN)
        self.two.weight = self.one.weight

    def middle(self, h):
        return self.two(torch.relu(self.one(h)))


class TiedByHook(Tied):
    """The second layer looks at the first one's weights before each pass."""

    def __init__(self):
        super().__init__()
        del self.two.weight
        self.two.register_forward_pre_hook(self.tie)

    def tie(self, layer, inputs):
        layer.weight = self.one.weight.t() + 0


class Normed(Net):
    """BatchNorm in the middle; `momentum=None` averages over all batches."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN, momentum=momentum)

    def middle(self, h):
        return self.norm(h)


def cumulative_norm():
    return Normed(momentum=None)


class SharedNorm(Normed):
    """One BatchNorm in two places: its statistics move twice in a pass."""

    def middle(self, h):
        return self.norm(self.norm(h).relu())


class FrozenNorm(Normed):
    """As most guides freeze it; `build` never calls `train()`."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def norm_in_eval():
    """Frozen once, after it was built."""
    net = Normed()
    net.norm.eval()
    return net


def body_in_eval():
    net = Net()
    net.body = nn.Sequential(net.body, nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5))
    net.body.eval()
    return net


class Dropped(Net):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def middle(self, h):
        return self.drop(h)


def dropout_in_eval():
    net = Dropped()
    net.drop.eval()
    return net


class ModesInForward(Dropped):
    """A pass without dropout for a mean, inside of one that has it."""

    def middle(self, h):
        was = self.training
        self.drop.eval()
        mean = self.drop(h).detach().mean()
        self.drop.train(was)
        return self.drop(h) - mean


class StochasticDepth(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def middle(self, h):
        for block in self.blocks:
            keep = (torch.rand(len(h), 1) < 0.7).float() if self.training else 0.7
            h = h + keep * torch.relu(block(h))
        return h


class Checkpointed(Net):
    """Activations are computed again in the backward pass, with the same dropout."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.3))

    def middle(self, h):
        return checkpoint(self.mix, h, use_reentrant=False)


class Autocast(Net):
    """The middle in bfloat16, by the module's own decision."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN)

    def middle(self, h):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.mix(h)
        return h.float()


class Variational(Net):
    """It also draws when it is evaluated."""

    def __init__(self):
        super().__init__()
        self.spread = nn.Parameter(torch.zeros(HIDDEN))

    def middle(self, h):
        return h + self.spread.exp() * torch.randn_like(h)


class Branch(Net):
    """A parameter that some micro-batches do not use."""

    def __init__(self):
        super().__init__()
        self.rare = nn.Linear(HIDDEN, HIDDEN)

    def middle(self, h):
        return h + self.rare(h) if h.detach().sum() > h.numel() * 0.65 else h


class GuardedCuda(Net):
    def middle(self, h):
        return h.cuda().cpu() if torch.cuda.is_available() else h


class NewParts(nn.Module):
    """What is passed from call to call is no state: all of it is made again."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(1, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        h = torch.zeros(len(x), HIDDEN)
        for step in range(WIDTH):
            h = self.cell(x[:, step : step + 1], h)
        return self.head(functional.dropout(h, 0.1, self.training))


GENERATOR = torch.Generator().manual_seed(5)


def drawn_at_import():
    """Weights from a generator of the module's own."""
    net = Net()
    with torch.no_grad():
        net.body.weight.normal_(generator=GENERATOR)
    return net


def threads_in_build():
    torch.set_num_threads(2)
    return Net()


def switches_in_build():
    """Switches of the process that cost speed or precision."""
    torch.backends.mkldnn.enabled = False
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    return Net()


def default_type_in_build():
    """Set for a moment, for buffers of another type."""
    torch.set_default_dtype(torch.float64)
    table = torch.linspace(0, 1, HIDDEN)
    torch.set_default_dtype(torch.float32)
    net = Net()
    net.register_buffer("table", table)
    return net


def drawn_from_random():
    """Weights from Python's generator, which nobody seeds here."""
    net = Net()
    with torch.no_grad():
        net.head.bias.copy_(torch.tensor([random.gauss(0, 1) for _ in range(CLASSES)]))
    return net


def with_hook(mask=None):
    """The gradient of a column is masked, by a hook of the parameter."""
    net = Net()
    mask = torch.ones(HIDDEN, WIDTH)
    mask[:, 2] = 0
    net.body.weight.register_hook(lambda gradient: gradient * mask)
    return net


class Bools(Net):
    """Looks at the type of its input."""

    def forward(self, x):
        return super().forward(torch.where(x.bool(), 1.0, -1.0))


class Masked(Net):
    """Samples are dictionaries, of a tokenizer as it were."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids * attention_mask)
