"""What own code has besides its weights: modes, generators, the order of sets."""

from pathlib import Path

import pytest
from conftest import Own, Train, fault

import samestep
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


FROZEN_BY_TRAIN = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first, self.norm = nn.Linear(width, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, classes)
        self.norm.running_mean.fill_(0.3)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""
FROZEN_BY_BUILD = """
def build(inputs, outputs):
    dropout, norm = nn.Dropout(0.5), nn.BatchNorm1d(8)
    norm.running_mean.fill_(0.3)
    dropout.eval(), norm.eval()
    return nn.Sequential(nn.Linear(*inputs, 8), norm, dropout, nn.Linear(8, outputs))
"""
DRAWS_WHEN_EVALUATED = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first, self.last = nn.Linear(width, 4), nn.Linear(4, classes)

    def forward(self, x):
        h = self.first(x)
        noise = np.random.standard_normal() + random.random()
        return self.last(h + torch.randn_like(h) + noise)

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""
UNSEEDED = """
def load():
    x, y = some()
    words = list(set("abcdefghijklmnop"))
    x = x[np.random.permutation(len(x))] + float(ord(words[0]))
    random.shuffle(words)
    return x * ord(words[0]) / 100, y

def build(inputs, outputs):
    model = nn.Linear(inputs[0], outputs)
    nn.init.constant_(model.bias, np.random.rand() + random.random())
    return model
"""


@pytest.mark.parametrize("code", [FROZEN_BY_TRAIN, FROZEN_BY_BUILD])
def test_a_part_in_evaluation_mode_stays_in_it(
    own: Own, train: Train, train_under: Train, code: str
) -> None:
    recipe = own(code, epochs=3)
    calm = train(recipe)
    killed = train_under(recipe, [fault("kill", "update", 5, 0)], workers=2)
    assert killed.weights_sha256 == calm.weights_sha256
    assert killed.result["restarts"]
    state = calm.load_model().state_dict()
    [mean] = [value for name, value in state.items() if name.endswith("running_mean")]
    assert mean.eq(0.3).all()


def test_evaluation_that_draws_is_the_same_at_any_number_of_workers(
    own: Own, train: Train
) -> None:
    recipe = own(DRAWS_WHEN_EVALUATED, epochs=3, evaluation_batch=4)
    runs = [train(recipe, workers) for workers in (1, 2, 3)]
    runs.append(train(recipe, 2, exchange="gloo"))
    assert len({run.weights_sha256 for run in runs}) == 1
    assert len({run.result["test_loss"] for run in runs}) == 1
    losses = {tuple(e["validation_loss"] for e in run.history) for run in runs}
    assert len(losses) == 1


def test_what_load_and_build_draw_depends_on_the_recipe_alone(
    own: Own, train: Train, tmp_path: Path
) -> None:
    recipe = own(UNSEEDED)
    here = train(recipe)
    with ForkServer() as another:
        there = samestep.train(
            recipe, workers=2, out=tmp_path / "x", view=SilentView(), server=another
        )
    assert there.weights_sha256 == here.weights_sha256
    assert train(own(UNSEEDED, seed=1)).weights_sha256 != here.weights_sha256
