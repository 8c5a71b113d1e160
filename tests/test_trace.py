"""Where the time goes: phases, who is waited for, and the trace."""

import json

import pytest
import torch
from conftest import Train, small_recipe

from samestep.messages.training import Span
from samestep.output import trace
from samestep.training.timing import PHASES, separate_waiting


@pytest.mark.parametrize(("workers", "exchange"), [(2, "shared"), (3, "gloo")])
def test_the_phases_of_every_worker_add_up_to_the_epoch(
    train: Train, workers: int, exchange: str
) -> None:
    recipe = small_recipe(data__train_samples=20_000, epochs=2)
    for epoch in train(recipe, workers, exchange=exchange).history:
        assert all(set(worker) == set(PHASES) for worker in epoch["workers"])
        sums = [sum(worker.values()) for worker in epoch["workers"]]
        assert sums[0] == pytest.approx(epoch["seconds"], rel=1e-9)  # one clock
        assert sums == pytest.approx([epoch["seconds"]] * workers, rel=0.02)


def test_waiting_is_charged_to_the_last_who_arrives() -> None:
    arrived = torch.tensor([[1.0, 3.0, 2.0], [7.0, 5.0, 6.0]], dtype=torch.float64)
    seconds = torch.zeros(3, len(PHASES), dtype=torch.float64)
    exchange, wait = PHASES.index("exchange"), PHASES.index("wait")
    seconds[:, exchange] = torch.tensor([5.0, 1.5, 9.0])
    times = separate_waiting(seconds, arrived)
    assert times.seconds[:, wait].tolist() == [2.0, 1.5, 2.0]  # at most what was there
    assert times.seconds[:, exchange].tolist() == [3.0, 0.0, 7.0]
    assert times.waited_for.tolist() == [1.5, 1.5, 0.0]
    use = times.use()
    assert use.straggler_share == pytest.approx(5.5 / 15.5)
    assert use.communication_share == 1.0


def test_bytes_exchanged_are_counted(train: Train) -> None:
    alone = train(small_recipe(), 1).history[0]
    assert alone["bytes_exchanged"] == alone["network_bytes"] == 0
    (shared,) = train(small_recipe(), 2).history
    (gloo,) = train(small_recipe(), 2, exchange="gloo").history
    parameters = 784 * 37 + 37 + 37 * 19 + 19 + 19 * 10 + 10
    least = 4 * parameters * 11  # bytes of the gradient in eleven steps
    # Three micro-batches of a worker are two partials; a layout has gaps.
    assert gloo["bytes_exchanged"] == 2 * 2 * least
    assert 3 * least <= shared["bytes_exchanged"] <= 3 * least * 1.05


def test_a_trace_has_all_phases_of_all_workers_without_overlap(train: Train) -> None:
    run = train(small_recipe(global_batch=32), 2, profile=5)
    content = json.loads((run.path / trace.FILE).read_text())
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert {event["args"]["step"] for event in events} == set(range(11, 16))
    for rank in (0, 1):
        own = [event for event in events if event["tid"] == rank]
        assert {"data", "forward", "backward", "exchange", "optimizer"} <= {
            event["name"] for event in own
        }
        ends = [event["ts"] + event["dur"] for event in own]
        assert all(
            end <= event["ts"] + 1e-3 for end, event in zip(ends, own[1:], strict=False)
        )


def test_a_trace_that_is_longer_than_the_training_ends_with_it(train: Train) -> None:
    run = train(small_recipe(global_batch=64), 1, profile=1000)
    content = json.loads((run.path / trace.FILE).read_text())
    steps = {e["args"]["step"] for e in content["traceEvents"] if e["ph"] == "X"}
    assert steps == set(range(11, 17))


def test_waiting_ends_where_the_last_worker_arrives() -> None:
    early = [Span(3, "backward", 0.0, 1.0), Span(3, "exchange", 1.0, 3.0)]
    late = [Span(3, "backward", 0.0, 3.0), Span(3, "exchange", 3.0, 1.0)]
    events = trace.chrome({0: early, 1: late})["traceEvents"]
    times = {
        (e["tid"], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"
    }
    assert times[0, "wait"] == (1e6, 2e6)
    assert times[0, "exchange"] == times[1, "exchange"] == (3e6, 1e6)
    assert (1, "wait") not in times


def test_the_result_names_confusions_and_worst_samples(train: Train) -> None:
    one, three = train(small_recipe(), 1), train(small_recipe(), 3)
    confusion, worst = one.result["test_confusion"], one.result["test_worst"]
    assert sum(map(sum, confusion)) == 10_000
    right = sum(confusion[label][label] for label in range(10))
    assert right / 10_000 == one.result["test_accuracy"]
    losses = [sample["loss"] for sample in worst]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 12
    assert confusion == three.result["test_confusion"]
    assert worst == three.result["test_worst"]
