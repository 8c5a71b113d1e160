"""The shares of a loop's workers follow their measured speed, and change no bit."""

from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_loop import by_workers, network, threads
from test_loop_data import Counted, Noisy
from test_loop_exchange import over
from torch.utils.data import DataLoader, Dataset

import samestep
from samestep import PlacementError
from samestep.core.balancer import random_ownership
from samestep.core.ownership import Share, fastest, lengths, makespan
from samestep.data.batches import global_batches
from samestep.data.given import GivenData
from samestep.user_code import seeding


assert threads  # the fixture for every test here

SCRIPT = """
import logging, sys, types
import torch
from torch import nn
import samestep
from samestep.training import timing

# A micro-batch takes worker 1 two and a half times as long as the others.
seconds = 0.0
timing.time = types.SimpleNamespace(perf_counter=lambda: seconds)
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
x = torch.randn(32 * 25 - 3, 5, generator=torch.Generator().manual_seed(0))
samples = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
torch.manual_seed(3)
layers = nn.Linear(5, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 3)
model = nn.Sequential(*layers)
optimizer = torch.optim.Adam(model.parameters(), 0.01)
loop = samestep.Loop(model, micro_batches=8)
counts = []
for step in loop.steps(torch.utils.data.DataLoader(samples, 32), epoch=0):
    counts.append(0)
    for inputs, targets in step:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        seconds += 0.1 if loop.rank == 1 else 0.04
        counts[-1] += 1
        loop.add(loss=loss * len(targets))
    optimizer.step()
owned = loop.gather([counts[0], counts[-1]])
loop.print(owned, loop.mean(), loop.fingerprint())
"""
MOVED = {2: ([4, 4], [6, 2], 40), 3: ([2, 3, 3], [4, 1, 3], 47)}
"""For each number of workers: their micro-batches, then those after the change, and
what share of the time it promises to save, in percent."""


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_a_slow_worker_gets_less_and_no_bit_changes(
    tmp_path: Path, exchange: str
) -> None:
    script = over(exchange, SCRIPT).replace('balance="random"', 'balance="auto"')
    alone, *others = by_workers(script, tmp_path, 1, *MOVED)
    result = alone.partition("]] ")[2]
    pairs = zip(others[::2], others[1::2], strict=True)
    for (change, end), moved_to in zip(pairs, MOVED.values(), strict=True):
        before, after, percent = moved_to
        counts = [", ".join(map(str, numbers)) for numbers in (after, before)]
        moved = " micro-batches instead of ".join(counts)
        assert change.startswith("rebalanced after step ")
        assert change.endswith(f": {moved}, {percent}% less time")
        owned = [list(pair) for pair in zip(before, after, strict=True)]
        assert end == f"{owned} {result}"


@given(st.integers(1, 20), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5))
def test_each_worker_of_a_loop_keeps_a_micro_batch(
    micro_batches: int, speeds: Sequence[float]
) -> None:
    total = micro_batches + len(speeds) - 1
    for owned in (
        fastest(total, speeds, 1),
        random_ownership(total, len(speeds), micro_batches, 1),
    ):
        assert min(lengths(owned)) >= 1
        assert owned[0][0] == 0
        assert owned[-1][1] == total
        assert makespan(fastest(total, speeds, 1), speeds) <= makespan(owned, speeds)


MOVES = [(1, 4), (0, 2), (0, 2), (0, 3), (2, 4)]
"""Before the last batch, which has 2 samples, all that was asked for has arrived."""


def loaded(samples: Dataset[Any], processes: int, moves: list[Share]) -> Any:
    """Return what a worker loads, by the global batch and the number in it.

    And a number that is drawn after each. As in other libraries' loops, a global batch
    is there before the one before it is computed.
    """
    loader = DataLoader(samples, 7, num_workers=processes)
    source = GivenData.of(loader, None, None)
    at, found = 0, {}
    batches = global_batches(source, 0, 1, 4, lambda: moves[at])
    with seeding.kept():
        for at, (batch, _) in enumerate(pairwise(chain(batches, [None]))):
            assert batch is not None
            for m in range(*moves[at]):
                if batch.size == 7 or m in (1, 3):
                    x, y = batch.fetch(m)
                    found[at, m] = x.tolist(), y.tolist(), torch.rand(()).item()
    assert at == 4
    return found


@pytest.mark.parametrize("samples", [Noisy(), Counted()], ids=["indexed", "stream"])
def test_what_processes_load_ahead_follows_a_share_that_moves(samples: Any) -> None:
    everything = loaded(samples, 0, [(0, 4)] * 5)
    for processes in (1, 2):
        found = loaded(samples, processes, MOVES)
        assert found == {key: everything[key] for key in found}
        assert len(found) == 3 + 2 + 2 + 3 + 1


def test_a_fixed_balance_is_used(tmp_path: Path) -> None:
    script = SCRIPT.replace("micro_batches=", "balance=(5, 3), micro_batches=")
    (line,) = by_workers(script, tmp_path, 2)
    assert line.startswith("[[5, 5], [3, 3]] ")


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ("fast", r"`auto`, `off`, or a number .* received `fast`"),
        ((2, 2), r"1 positive numbers that add up to 4; received `2,2`"),
        ((3,), r"add up to 4; received `3`"),
    ],
)
def test_a_balance_that_does_not_fit_is_refused(balance: Any, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        samestep.Loop(network(), 4, balance=balance)
    assert samestep.Loop(network(), 4, balance=(4,)).workers == 1
