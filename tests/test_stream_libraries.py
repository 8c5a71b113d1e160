"""Streams of Hugging Face, torchdata and WebDataset, in `train` and in a loop."""

from pathlib import Path
from typing import Any

import library_streams
import pytest
from conftest import Own, Train, fault
from library_streams import STREAMS, write_shards
from test_loop import by_workers


SOURCE = Path(library_streams.__file__).read_text()
LOOP = (
    SOURCE
    + """
import samestep
from torch import nn
from torch.utils.data import DataLoader

def trained(kind, stop):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    loop = samestep.Loop(model, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = 0
    while loop.epoch < 2:
        stream = STREAMS[kind][0]()
        size = None if isinstance(stream, DataLoader) else 16
        for step in loop.steps(stream, size, epoch=loop.epoch):
            for batch in step:
                x, y = batch.values() if isinstance(batch, dict) else batch
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == stop:
                state = loop.state_dict()
                loop = samestep.Loop(model, 6)
                loop.load_state_dict(state)
                break
    sha256 = loop.fingerprint()
    return [sha256] if loop.rank == 0 else []
"""
)


def kinds(*quick: str) -> list[Any]:
    """Return all; the others take long, since each process imports their library."""
    full = pytest.mark.full
    return [pytest.param(k, marks=[] if k in quick else full) for k in STREAMS]


@pytest.mark.parametrize("kind", kinds("stateful loader", "nodes", "web dataset"))
def test_a_stream_of_a_library_is_trained_exactly_after_kills(
    kind: str, train: Train, train_under: Train, own: Own, tmp_path: Path
) -> None:
    pytest.importorskip(STREAMS[kind][1])
    write_shards(tmp_path)
    source = SOURCE.replace('DIRECTORY = "."', f"DIRECTORY = {str(tmp_path)!r}")
    data = {"data.arguments": {"kind": kind}, "data.outputs": 3}
    recipe = own(source, global_batch=16, epochs=2, **data)
    alone = train(recipe, 1, prefetch="off")
    kills = [fault("kill", "forward", s, rank=1, number=n) for n, s in ((1, 3), (2, 9))]
    run = train_under(recipe, kills, 3)
    assert run.weights_sha256 == alone.weights_sha256


@pytest.mark.parametrize("kind", kinds("nodes"))
def test_a_loop_goes_on_in_a_stream_of_a_library(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(STREAMS[kind][1])
    write_shards(tmp_path)
    script = LOOP + f"found = trained({kind!r}, None) + trained({kind!r}, 9)\n"
    script += "if found: print(*found)"
    alone, together = by_workers(script, tmp_path, 1, 2)
    assert alone == together
    assert len(set(alone.split())) == 1
