"""Portable arithmetic for the user's own losses, and for several inputs."""

from pathlib import Path

import pytest
from conftest import Own, Train, fault
from test_several_inputs import IN_MEMORY, PAIRS, ROWS

from samestep import NotPortable, RecipeError
from samestep.api.check import check_exactness
from samestep.api.record import record
from samestep.kernels.library import VARIABLE, supported_isas
from samestep.supervisor.forkserver_client import ForkServer


PORTABLE = {"arithmetic": "portable"}
FOCAL = """
def build(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs[0], 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(9, outputs),
    )

def loss(outputs, targets):
    weights = torch.tensor([0.5, 1.0, 2.0])
    each = functional.cross_entropy(outputs, targets, reduction="none")
    focal = weights[targets] * (1 - torch.exp(-each)) ** 2 * each
    right, is_rare = outputs.argmax(1) == targets, targets == 2
    return focal.sum(), weights[targets].sum(), {
        "right": right.sum(),
        "right_of_rare": ((right & is_rare).sum(), is_rare.sum()),
        "near": (outputs.argmax(1) - targets).abs() <= 1,
    }
"""


def test_an_own_loss_has_one_fingerprint_at_any_placement_and_after_a_kill(
    train: Train, train_under: Train, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = own(FOCAL, **PORTABLE)
    alone = train(recipe, 1)
    two = train(recipe, 2)
    kill = [fault("kill", "exchange", 2, rank=1)]
    monkeypatch.setenv(VARIABLE, supported_isas()[-1])
    run = train_under(recipe, kill, 3, exchange="gloo", balance="random")
    assert run.result["restarts"] == 1
    names = ("weights_sha256", "test_loss", "test_right", "test_right_of_rare")
    for name in names:
        assert two.result[name] == run.result[name] == alone.result[name]


def test_a_loss_that_combines_samples_is_refused(train: Train, own: Own) -> None:
    recipe = own(
        FOCAL.replace("return focal.sum(),", "return focal.sum().log(),"), **PORTABLE
    )
    with pytest.raises(NotPortable, match="combines the samples of a micro-batch"):
        train(recipe)


def test_a_mean_over_samples_is_refused(train: Train, own: Own) -> None:
    code = FOCAL.replace("weights[targets].sum(),", "(focal * 1.0).mean(),")
    with pytest.raises(NotPortable, match="a mean over the samples"):
        train(own(code, **PORTABLE))


@pytest.mark.parametrize("code", [ROWS, IN_MEMORY, PAIRS])
def test_several_inputs_have_one_fingerprint_at_any_placement(
    train: Train, train_under: Train, own: Own, code: str
) -> None:
    recipe = own(code, **PORTABLE)
    alone = train(recipe, 1, prefetch="off")
    kill = [fault("kill", "exchange", 1, rank=1)]
    run = train_under(recipe, kill, 3, exchange="gloo", balance="random")
    assert run.result["restarts"] == 1
    for name in ("weights_sha256", "test_loss"):
        assert run.result[name] == alone.result[name]


MIXED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, words, pixels, kept, scale):
        assert pixels.dtype == torch.uint8 and kept.dtype == torch.bool
        seen = self.words(words.clamp(min=0) * kept)
        h = seen * (kept & (words >= 0)).unsqueeze(-1) + (pixels / 255).unsqueeze(-1)
        return self.last((h * scale.unsqueeze(1)).sum(1))

def load():
    draw = torch.Generator().manual_seed(3)
    words = torch.randint(-2, 9, (90, 5), generator=draw)
    pixels = torch.randint(256, (90, 5), generator=draw).to(torch.uint8)
    scale = torch.randn(90, 1, generator=draw)
    samples = {"words": words, "pixels": pixels, "kept": words != 4, "scale": scale}
    return samples, torch.arange(90) % 3

def build(outputs):
    return Net()
"""


def test_a_program_file_has_one_input(own: Own, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot have several inputs"):
        record(own(MIXED, **PORTABLE), tmp_path / "program")


def test_inputs_of_all_types_have_one_fingerprint(train: Train, own: Own) -> None:
    """Before each training, the gradients are compared with PyTorch's."""
    recipe = own(MIXED, **PORTABLE)
    one, several = train(recipe, 1), train(recipe, 3, exchange="gloo")
    assert one.weights_sha256 == several.weights_sha256


def test_check_lists_all_operations_without_a_kernel(
    own: Own, server: ForkServer
) -> None:
    code = FOCAL.replace(
        "return focal.sum(),",
        "focal = focal + torch.special.i0e(outputs).sum(1)\n"
        "    return focal.sum() + outputs.topk(2).values.sum(),",
    )
    verdict = check_exactness(own(code, **PORTABLE), server=server)
    assert not verdict.is_exact
    assert len(verdict.outcomes) == 1
    first, *lines, last = verdict.reasons
    assert first.endswith("has no kernels for these operations:")
    assert any("`aten.special_i0e.default` (the loss, " in line for line in lines)
    assert any("`aten.topk.default`" in line for line in lines)
    assert last.startswith("Use others")
