"""Sources of modules with models, data and losses, as users write them."""

HEAD = """
import random
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

def some(n=100, classes=3, width=5):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    x = torch.randn(n, width, generator=generator)
    x[torch.arange(n), y] += 2
    return x, y

def load():
    x, y = some()
    return {"train": (x[:70], y[:70]), "validation": (x[70:85], y[70:85]),
            "test": (x[85:], y[85:])}

def build(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs[0], 7), nn.ReLU(), nn.Linear(7, outputs))
"""

EVERYTHING = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.embed = nn.Linear(width, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, width, bias=False)
        self.head.weight = nn.Parameter(torch.empty(width, 8))
        self.tied = self.head
        self.last = nn.Linear(width, classes)
        self.register_buffer("scale", torch.full((1, 8), 0.1))
        self.register_buffer("order", torch.arange(8))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        nn.init.normal_(self.head.weight)

    def forward(self, x):
        h = self.frozen(self.norm(self.embed(x)))[:, self.order] * self.scale
        h = functional.dropout(h, 0.2, self.training)
        return self.last(torch.relu(self.tied(torch.relu(h))))

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""

DATASETS = """
class Noisy(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y
    def __len__(self):
        return len(self.y)
    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return {"label": int(self.y[i]), "image": self.x[i].numpy() + noise}

def load():
    return Noisy(*some())
"""

REGRESSION = """
def load():
    x, _ = some()
    return x.double().numpy(), x.sum(dim=1).numpy()
"""

TOKENS = """
def load():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(6, (40, 8), generator=generator)
    return {"train": (text[:, :-1], text[:, 1:]), "test": (text[:5, :-1], text[:5, 1:])}

def build(outputs):
    return nn.Sequential(nn.Embedding(outputs, 7), nn.Linear(7, outputs))
"""

LOSS = """
def loss(outputs, targets):
    each = functional.cross_entropy(outputs, targets, reduction="none")
    return each, {"confident": (outputs.softmax(1).max(1).values > 0.5).sum()}
"""

METRICS = """
def loss(outputs, targets):
    each = functional.cross_entropy(outputs, targets, reduction="none")
    right, is_rare = outputs.argmax(1) == targets, targets == 2
    return each.sum(), {
        "right": right.sum(),
        "rare_right": ((right & is_rare).sum(), is_rare.sum()),
        "confidence": outputs.softmax(1).max(1).values.sum(),
    }
"""
