"""Trackers: they see everything, and nothing depends on them."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import small_recipe
from test_launch import DEADLINE, long_training

import samestep
from samestep import Placement, Run, UsageError
from samestep.output import trackers
from samestep.output.console import SilentView
from samestep.output.trackers import Follower, Tracker, Tracking
from samestep.supervisor.forkserver_client import ForkServer
from samestep.user_code.imports import load


EXAMPLES = Path(__file__).parents[1] / "examples"
RECORD = {"type": "step", "step": 1}


class Notes(SilentView):
    """What a person would read."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def follow(
    server: ForkServer,
    out: Path,
    *trackers: Tracker | str,
    recipe: samestep.Recipe | None = None,
    view: SilentView | None = None,
    **placed: Any,
) -> Run:
    return samestep.train(
        recipe or small_recipe(),
        Placement(out=out, **({"workers": 2} | placed)),
        trackers=trackers,
        view=view or SilentView(),
        server=server,
    )


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in (None, line["type"])]


def test_a_tracker_gets_the_lines_of_metrics_jsonl_a_first_and_a_last_record(
    server: ForkServer, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    recipe = small_recipe(epochs=2)
    run = follow(server, tmp_path / "run", seen.append, recipe=recipe)
    first, *lines, last = seen
    assert lines == metrics(run.path)
    assert last == {"type": "finished", **run.result}
    assert first == {
        "type": "started",
        "recipe": recipe.to_dict(),
        "placement": run.result["placement"],
        "run": str(run.path),
        "step": 0,
    }


def test_a_tracker_hears_of_a_failure(server: ForkServer, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    recipe = small_recipe(optimizer={"name": "sgd", "lr": 1e30})
    with pytest.raises(samestep.NonFiniteLoss):
        follow(server, tmp_path / "run", seen.append, recipe=recipe)
    assert [record["type"] for record in seen][:: len(seen) - 1] == [
        "started",
        "failed",
    ]
    assert "The loss must be finite" in seen[-1]["error"]


def test_a_tracker_from_the_current_directory_hears_of_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "seen = open('seen', 'w')\n\ndef track(record):\n"
    code += "    print(record['type'], file=seen, flush=True)\n"
    Path("mine.py").write_text(code)
    tracker = ["--tracker", "mine:track", "--no-tensorboard"]
    with long_training(Path("run"), *tracker) as (process, _):
        process.send_signal(signal.SIGTERM)
        stderr = process.communicate(timeout=DEADLINE)[1]
        assert process.returncode == 143, stderr
    first, *_, last = Path("seen").read_text().split()
    assert (first, last) == ("started", "interrupted")
    assert not Path("run", "tensorboard").exists()


def fail_after_the_start(followed: Tracking) -> None:
    followed.send({"type": "started"})
    raise samestep.OutputError("The disk is full.")


def test_every_start_has_an_end_even_if_nobody_could_write_one() -> None:
    seen: list[dict[str, Any]] = []
    followed = Tracking([seen.append], print)
    with pytest.raises(samestep.OutputError), followed:
        fail_after_the_start(followed)
    assert seen[1:] == [{"type": "failed", "error": "The disk is full."}]
    with pytest.raises(samestep.OutputError), Tracking([seen.append], print):
        raise samestep.OutputError("Not even started.")
    assert len(seen) == 2


@pytest.mark.parametrize(
    "error", [KeyError("loss"), SystemExit(3), KeyboardInterrupt()]
)
def test_a_tracker_that_raises_is_switched_off_and_nothing_else_happens(
    server: ForkServer, tmp_path: Path, error: BaseException
) -> None:
    calls: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    notes = Notes()

    def bad(record: dict[str, Any]) -> None:
        calls.append(record)
        if len(calls) == 2:
            raise error

    out = tmp_path / "run"
    run = follow(server, out, bad, seen.append, view=notes)
    assert run.status == "finished"
    assert (len(calls), len(seen)) == (2, len(metrics(out)) + 2)
    (warning,) = [text for text in notes.texts if text.startswith("warning")]
    assert f"bad` failed: {type(error).__name__}" in warning
    assert "(test_tracking.py, line" in warning


def test_a_tracker_cannot_change_what_others_see(
    server: ForkServer, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []

    def vandal(record: dict[str, Any]) -> None:
        for value in record.values():
            if isinstance(value, list | dict):
                value.clear()
        record.clear()

    run = follow(server, tmp_path / "run", vandal, seen.append)
    assert seen[1:-1] == metrics(run.path)
    assert Run.open(run.path).history[0]["seconds_by_phase"]


def test_a_tracker_that_hangs_delays_only_the_end_and_only_until_a_deadline(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.1)
    seen: list[dict[str, Any]] = []
    notes, released = Notes(), threading.Event()

    def stuck(_: dict[str, Any]) -> None:
        released.wait(DEADLINE)

    try:
        out = tmp_path / "run"
        run = follow(server, out, stuck, seen.append, view=notes)
    finally:
        released.set()
    assert run.status == "finished"
    assert len(seen) == len(metrics(out)) + 2
    (warning,) = [text for text in notes.texts if text.startswith("warning")]
    left = len(seen)
    assert f"stuck` has not taken its last {left} records within 0.1 s" in warning


def test_a_tracker_that_stays_behind_is_switched_off_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    warnings: list[str] = []
    gate = threading.Event()
    follower = Follower(lambda _: gate.wait(), warnings.append)
    for _ in range(9):
        follower.send(RECORD)
    assert len(warnings) == 1
    assert "is 3 records behind" in warnings[0]
    gate.set()
    follower.ask_to_finish()
    follower.await_finish(0.0, 0.0)
    assert len(warnings) == 1


def test_a_module_in_the_current_directory_is_found_for_this_import_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nearby_module.py").write_text("def track(record): pass\n")
    (tmp_path / "json.py").write_text("raise AssertionError\n")
    before = sys.path.copy()
    tracker = load("nearby_module:track", "tracker")
    assert tracker.__module__ == "nearby_module"
    assert sys.path == before
    assert load("json:dumps", "tracker") is json.dumps  # a library's module comes first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "A tracker is named as `module:function`"),
        (":track", "A tracker is named as `module:function`"),
        ("half_way:", "A tracker is named as `module:function`"),
        ("half_wya:track", "there is no `half_wya`. Did you mean `half_way`?"),
        ("half_way.py:track", "there is no `half_way.py`. Did you mean `half_way`?"),
        ("xml.don:track", "there is no `xml.don`. Did you mean `xml.dom`?"),
        ("half_way:trakc", "no function `trakc`. Did you mean `track`?"),
        ("half_way:number", "no function `number`"),
        ("broken:track", "ZeroDivisionError: division by zero (broken.py, line 1)"),
        ("needy:track", "No module named 'no_such_module' (needy.py, line 1)"),
        ("wrong:track", "invalid syntax (wrong.py, line 1)."),
    ],
)
def test_a_tracker_that_cannot_be_had_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "half_way": "number = 1\ndef track(record): pass\n",
        "broken": "1 / 0\n",
        "needy": "import no_such_module\n",
        "wrong": "def\n",
    }
    for module, code in files.items():
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UsageError) as caught:
        load(name, "tracker")
    assert message in str(caught.value)


@pytest.mark.parametrize("command", [["train", "--out", "run"], ["resume", "run"]])
def test_an_unknown_tracker_ends_the_command_before_anything_is_written(
    tmp_path: Path, command: list[str]
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "samestep", *command, "--tracker", "nowhere:track"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 2
    assert "there is no `nowhere`" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not [*tmp_path.iterdir()]


def note_call(calls: list[Any], function: str, /, *args: Any, **kwargs: Any) -> None:
    calls.append((function, {**kwargs, **dict(*args)}))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """The calls of a library that has wandb's functions."""
    calls: list[tuple[str, Any]] = []
    module = ModuleType("wandb")
    for name in ("init", "log", "finish"):
        setattr(module, name, partial(note_call, calls, name))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.chdir(EXAMPLES)
    yield calls
    for example in ("track_wandb", "track_csv"):
        sys.modules.pop(example, None)


def test_the_examples_do_what_they_say(
    server: ForkServer, tmp_path: Path, wandb: list[tuple[str, Any]]
) -> None:
    out = tmp_path / "run"
    run = follow(server, out, "track_wandb:track", "track_csv:track")
    assert [name for name, _ in wandb][:2] == ["init", "log"]
    assert [name for name, _ in wandb][-2:] == ["log", "finish"]
    assert wandb[0][1]["name"] == "run"
    assert wandb[0][1]["config"] == run.recipe.to_dict()
    logged = [fields for name, fields in wandb if name == "log"]
    steps = metrics(out, "step")
    assert logged[0]["loss"] == steps[0]["loss"]
    assert logged[-2]["epoch/validation_loss"] == run.history[0]["validation_loss"]
    assert logged[-1]["test_accuracy"] == run.result["test_accuracy"]
    numbers = [fields["step"] for fields in logged]
    assert numbers == sorted(numbers)

    rows = (out / "steps-from-0.csv").read_text().splitlines()
    assert rows[0].startswith("step,epoch,loss,")
    assert [float(row.split(",")[2]) for row in rows[1:]] == [r["loss"] for r in steps]


def test_the_guide_links_every_example() -> None:
    guide = (EXAMPLES.parent / "docs" / "tracking.md").read_text()
    for example in EXAMPLES.glob("track_*.py"):
        assert f"../examples/{example.name}" in guide
