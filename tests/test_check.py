"""`samestep check`: what breaks exactness is found and said."""

import pytest
from conftest import Own
from own_samples import EVERYTHING

from samestep.api import check_exactness
from samestep.forking import ForkServer


INEXACT = {
    "numpy": (
        "self.own = getattr(self, 'own', None) or np.random.default_rng(0);"
        " x = x + self.own.random()",
        "the second time: the gradients, the loss",
    ),
    "memory": (
        "self.calls = getattr(self, 'calls', 0) + 1; x = x + self.calls",
        "the second time: the gradients, the loss",
    ),
    "rank": (
        "import os; x = x + int(os.environ['RANK'])",
        "Something depends on the worker",
    ),
}


@pytest.mark.parametrize("reason", INEXACT)
def test_check_says_what_breaks_exactness(
    own: Own, server: ForkServer, reason: str
) -> None:
    line, message = INEXACT[reason]
    recipe = own(
        "class Net(nn.Linear):\n"
        " def forward(self, x):\n"
        f"  {line}\n"
        "  return super().forward(x)\n"
        "def build(inputs, outputs): return Net(*inputs, outputs)\n"
    )
    verdict = check_exactness(recipe, server=server)
    assert not verdict.is_exact
    assert any(message in each for each in verdict.reasons), verdict.reasons


def test_check_finds_nothing_where_nothing_is(own: Own, server: ForkServer) -> None:
    verdict = check_exactness(own(EVERYTHING, global_batch=36), server=server)
    assert verdict.reasons == []
    assert [trial.workers for trial in verdict.trials] == [1, 1, 2, 2, 3, 3]
