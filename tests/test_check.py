"""`samestep check`: what breaks exactness is found and said."""

from dataclasses import replace
from typing import Any

import pytest
from conftest import Own
from own_samples import EVERYTHING

from samestep import Placement
from samestep.api.check import check_exactness
from samestep.data.prefetch import HelperProcess
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import make_setup
from samestep.training import worker
from samestep.training.components import load_data
from samestep.user_code.references import UserCode


INEXACT = {
    "memory": (
        "self.calls = getattr(self, 'calls', 0) + 1; x = x + (self.calls > 30)",
        "another result in another process: the loss, the gradients",
    ),
    "rank": (
        "import os; x = x + int(os.environ['RANK'])",
        "another result in another worker: the loss, the gradients",
    ),
    "address": (
        "x = x + id(torch) % 1021 / 1021",
        "The weights differ between placements",
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


def test_a_helper_draws_from_the_same_few_batches_as_its_worker(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = own(EVERYTHING, global_batch=12)
    setup = replace(make_setup(recipe, Placement(workers=1)), max_steps=2)
    monkeypatch.setattr(HelperProcess, "start", lambda load, _: load())
    user_code = UserCode(setup.search_path)
    made: Any = worker._helper(recipe, setup, user_code, {})
    _, plan = load_data(recipe, user_code, setup.max_steps)
    assert made._plan == plan
    assert plan != load_data(recipe, user_code)[1]


def test_check_finds_nothing_where_nothing_is(own: Own, server: ForkServer) -> None:
    verdict = check_exactness(own(EVERYTHING, global_batch=36), server=server)
    assert verdict.reasons == []
    assert [each.trial.workers for each in verdict.outcomes] == [1, 1, 2, 2, 3, 3, 2, 1]
    assert len({tuple(each.sha256) for each in verdict.outcomes}) == 1
