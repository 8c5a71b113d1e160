"""TensorBoard events, read back by TensorBoard's own reader."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Train, small_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launch import DEADLINE, long_training
from test_resume import forget_after
from test_tracking import follow, metrics

import samestep
from samestep import Placement
from samestep.output.console import SilentView
from samestep.output.tensorboard import TensorBoard, step_scalars
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import fault_injection


def read_back(run: Path) -> EventAccumulator:
    """Read events with TensorBoard's own reader, without its sampling."""
    everything = {"scalars": 0, "tensors": 0}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=everything)
    events.Reload()
    return events


def series(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def expected(run: Path, key: str) -> list[tuple[int, float]]:
    """A field of the step records, in the precision of the events."""
    return [(r["step"], single(r[key])) for r in metrics(run, "step")]


def single(value: float) -> float:
    return float(np.float32(value))


def test_the_events_are_the_records_as_tensorboard_itself_reads_them(
    train: Train,
) -> None:
    run = train(small_recipe(epochs=2), 2)
    events = read_back(run.path)
    pairs = {
        "train/loss": "loss",
        "train/accuracy": "accuracy",
        "lr": "lr",
        "samples_per_second": "samples_per_second",
    }
    for tag, key in pairs.items():
        assert series(events, tag) == expected(run.path, key)
    steps = metrics(run.path, "step")
    last_steps = [r["step"] for r in steps if r["step"] % 11 == 0]
    for key in ("loss", "accuracy"):
        values = [single(epoch[f"validation_{key}"]) for epoch in run.history]
        validation = list(zip(last_steps, values, strict=True))
        assert series(events, f"validation/{key}") == validation
        test = single(run.result[f"test_{key}"])
        assert series(events, f"test/{key}") == [(last_steps[-1], test)]
    (recipe,) = events.Tensors("recipe")
    text = recipe.tensor_proto.string_val[0].decode()
    assert text.replace("    ", "", 1).startswith('name = "mnist-mlp"')
    assert 'name = "adam' in text


def test_phases_are_seconds_per_step_and_waiting_is_a_share(train: Train) -> None:
    run = train(small_recipe(), 2)
    events, before = read_back(run.path), 0
    for index, record in enumerate(metrics(run.path, "step")):
        steps, before = record["step"] - before, record["step"]
        for phase in record["workers"][0]:
            mean = sum(worker[phase] for worker in record["workers"]) / 2 / steps
            expected_ = (record["step"], single(mean))
            assert series(events, f"phases/{phase}")[index] == expected_
        for rank, worker in enumerate(record["workers"]):
            share = worker["wait"] / sum(worker.values())
            expected_ = (record["step"], single(share))
            assert series(events, f"waiting/worker-{rank}")[index] == expected_


def test_what_is_unknown_is_left_out() -> None:
    worker = {"forward": 1.0, "wait": 3.0}
    record = {"loss": 1, "accuracy": 1, "lr": 1, "samples_per_second": 1}
    unknown = record | {"workers": [worker], "noise_scale": None}
    assert "noise_scale" not in step_scalars(unknown, 2)
    known = step_scalars(unknown | {"noise_scale": 7.0}, 2)
    assert (known["noise_scale"], known["phases/wait"]) == (7.0, 1.5)
    assert known["waiting/worker-0"] == 0.75


@pytest.mark.parametrize("cut", [0, 5])
def test_after_resume_no_step_is_there_twice_even_if_a_kill_has_cut_an_event(
    train: Train, server: ForkServer, cut: int
) -> None:
    seen: list[dict[str, Any]] = []
    path = train(small_recipe(epochs=3), 2, keep_checkpoints=3).path
    *_, earlier, last = checkpoint.steps(checkpoint.directory_of(path))
    forget_after(path, earlier)
    (file,) = (path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size - cut])
    run = samestep.resume(
        path, Placement(workers=1), trackers=[seen.append], view=SilentView(),
        server=server,
    )  # fmt: skip
    assert seen[0]["step"] == earlier
    assert next(r["step"] for r in seen if r["type"] == "step") > earlier
    events = read_back(path)
    assert series(events, "train/loss") == expected(path, "loss")
    assert series(events, "train/loss")[-1][0] == last
    assert len(series(events, "validation/loss")) == len(run.history)
    assert [step for step, _ in series(events, "test/loss")] == [last]


def test_a_kill_loses_no_event(tmp_path: Path) -> None:
    with long_training(tmp_path / "run") as (process, _):
        process.kill()
        process.wait()
    found = series(read_back(tmp_path / "run"), "train/loss")
    lines = expected(tmp_path / "run", "loss")
    assert found == lines[: len(found)]
    assert len(found) >= len(lines) - 2 or not found


def test_events_wait_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "full"
    monkeypatch.setenv(fault_injection.DISK_FULL, str(flag))
    tracker = TensorBoard(tmp_path / "tensorboard")
    fields = {"loss": 1.0, "accuracy": 0.5, "lr": 0.1, "samples_per_second": 9.0}
    step = fields | {"type": "step", "workers": [{"wait": 0.0}]}
    recipe = small_recipe().to_dict()
    tracker({"type": "started", "step": 0, "recipe": recipe})
    for number in range(1, 9):
        if number == 3:
            flag.touch()
        if number == 6:
            flag.unlink()
        tracker(step | {"step": number})
    flag.touch()
    tracker(step | {"step": 9})
    with pytest.raises(OSError, match="No space left"):
        tracker({"type": "finished"})
    flag.unlink()
    tracker({"type": "finished"})
    found = [step for step, _ in series(read_back(tmp_path), "train/loss")]
    assert found == list(range(1, 10))


def test_the_supervisor_imports_no_torch_for_events_and_others_may_import_tensorboardx(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; from samestep.output import tensorboard; tensorboard._library()\n"
        "assert 'torch' not in sys.modules and 'tensorboardX' not in sys.modules\n"
        "sys.modules['torch'] = None  # saves time\n"
        "import tensorboardX; tensorboardX.SummaryWriter('events').close()\n"
        "tensorboard._library()"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, check=True, timeout=DEADLINE, cwd=tmp_path)


def test_without_tensorboardx_there_are_no_events_and_insisting_is_an_error(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    run = follow(server, tmp_path / "run")
    assert not (run.path / "tensorboard").exists()
    assert run.result["placement"]["tensorboard"] is False
    with pytest.raises(samestep.PlacementError, match=r"samestep\[tensorboard\]"):
        follow(server, tmp_path / "other", tensorboard=True)
    assert not (tmp_path / "other").exists()
