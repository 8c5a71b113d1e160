"""`samestep scale`: what is asked for, measured and kept; real workers."""

import csv
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import small_recipe
from scaling_samples import settings

from samestep.errors import Interrupted, PlacementError, RecipeError, RunError
from samestep.messages.training import Measured
from samestep.output.schema import Analysis
from samestep.scaling import measure, scale, units
from samestep.scaling.grid import (
    check,
    default_workers,
    from_options,
    grid,
    parse_counts,
    schedule,
)
from samestep.scaling.study import Study, open_study, read
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system.machine import describe
from samestep.system.signals import Stop


# Units and lists


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("10Gbit", 1.25e9),
        ("10 Gbit/s", 1.25e9),
        ("100Mbps", 12.5e6),
        ("1GB", 1e9),
        ("2.5kB/s", 2500.0),
    ],
)
def test_a_bandwidth_is_read_in_bits_or_bytes(
    text: str, bytes_per_second: float
) -> None:
    assert units.bandwidth(text) == pytest.approx(bytes_per_second)


@pytest.mark.parametrize(
    ("text", "seconds"), [("50us", 50e-6), ("0.1ms", 1e-4), ("2 s", 2.0), ("7µs", 7e-6)]
)
def test_a_latency_is_read(text: str, seconds: float) -> None:
    assert units.latency(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["10", "Gbit", "-1Gbit", "0GB", "1.2.3GB", "10Gb", ""])
def test_an_unknown_bandwidth_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PlacementError, match="such as `10Gbit`"):
        units.bandwidth(text)


@pytest.mark.parametrize("text", ["50", "us", "50 parsec", "0us", "nan s"])
def test_an_unknown_latency_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PlacementError, match="such as `50us`"):
        units.latency(text)


@pytest.mark.parametrize("text", ["", "2,1", "1,1", "0,1", "1,,2", "1,two", "1.5"])
def test_a_list_that_does_not_increase_is_refused(text: str) -> None:
    with pytest.raises(PlacementError, match="increasing positive numbers"):
        parse_counts(text, "workers")


def test_the_default_is_every_useful_worker_count_up_to_the_cores() -> None:
    assert default_workers(2, 4) == (1, 2)
    assert default_workers(8, 4) == (1, 2, 3, 4)
    assert default_workers(20, 64) == (1, 2, 3, 4, 6, 8, 12, 16, 20)
    assert default_workers(1, 8) == (1,)


def test_what_cannot_be_measured_or_predicted_is_refused() -> None:
    recipe = small_recipe()
    with pytest.raises(PlacementError, match="7 workers cannot share 6 micro-batches"):
        check(settings(workers=(1, 7)), recipe)
    with pytest.raises(RecipeError, match="smallest global batch only 4"):
        check(settings(global_batches=(4, 96)), recipe)
    with pytest.raises(PlacementError, match="add `--bandwidth` and `--latency`"):
        check(settings(nodes_up_to=4), recipe)
    with pytest.raises(PlacementError, match="--nodes-up-to 64"):
        check(settings(latency_seconds=1e-4), recipe)


# What is measured, and in which order


def test_every_round_has_every_point_once_in_an_order_of_its_own() -> None:
    points = grid(settings(workers=(1, 2, 3, 4), weak=True), 6)
    cells = list(schedule(points, rounds=5))
    rounds = [
        [point for _, point in group]
        for _, group in itertools.groupby(cells, key=lambda cell: cell[0])
    ]
    assert [number for number, _ in cells] == sorted(number for number, _ in cells)
    assert all(Counter(order) == Counter(points) for order in rounds)
    assert len({tuple(order) for order in rounds}) == 5
    assert cells == list(schedule(points, rounds=5))


def test_weak_scaling_keeps_the_samples_per_worker() -> None:
    points = grid(settings(workers=(1, 2, 4), weak=True), 6)
    weak = [p for p in points if p.kind == "weak"]
    assert [p.global_batch / p.workers for p in weak] == [96] * 3
    assert [p.micro_batches / p.workers for p in weak] == [6] * 3


def test_every_worker_count_has_its_limit() -> None:
    points = grid(settings(workers=(1, 2, 4)), 6)
    assert [p.workers for p in points if p.kind == "limit"] == [2, 4]


# Measuring goes on where it stopped


def fake_report(steps: int = 10) -> Measured:
    phases = {"data": 0.1, "forward": 0.4, "backward": 0.4, "exchange": 0.1}
    return Measured(
        steps=steps,
        samples=960,
        seconds=1.0,
        step_seconds_sd=0.01,
        workers=[{**phases, "wait": 0.0, "optimizer": 0.0, "other": 0.0}],
        bytes_per_step=7,
        gradient_bytes=4096,
        add_seconds=1e-4,
        noise_scale=None,
    )


def opened(path: Path, processor: str = "A", seed: int = 0, **asked: Any) -> Study:
    recipe, wanted = small_recipe(seed=seed), settings(rounds=2, **asked)
    points = grid(wanted, recipe.micro_batches)
    with open_study(path, recipe, {"processor": processor}, wanted, points) as study:
        return study


def test_finished_cells_are_not_measured_again(
    tmp_path: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    cells: list[int] = []

    def on_cell(done: int, *_: object) -> None:
        cells.append(done)

    def run_cell(*_: object) -> list[Measured]:
        if len(cells) == 4:
            stop.number = 15
        return [fake_report()]

    monkeypatch.setattr(measure, "run_cell", run_cell)
    out = tmp_path / "scale"
    study = opened(out)
    with pytest.raises(
        Interrupted, match=r"stopped after 3 of 8 measurements; .*--out"
    ):
        measure.measure(study, server, stop, on_cell)
    again = opened(out)
    assert sum(map(len, again.runs.values())) == 3
    assert again.gradient_bytes == 4096
    measure.measure(again, server, Stop(), on_cell)
    assert cells == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert all(
        [run.round for run in runs] == [1, 2] for runs in opened(out).runs.values()
    )


def test_a_directory_of_other_settings_recipe_or_machine_is_refused(
    tmp_path: Path,
) -> None:
    out = tmp_path / "scale"
    opened(out)
    with pytest.raises(RunError, match="`workers` was 1,2, now it is 1,3"):
        opened(out, workers=(1, 3))
    with pytest.raises(RunError, match="another recipe"):
        opened(out, seed=1)
    with pytest.raises(RunError, match="another machine or installation"):
        opened(out, processor="B")


def test_only_one_process_measures_into_a_directory(tmp_path: Path) -> None:
    out, points = tmp_path / "scale", grid(settings(rounds=2), 6)
    with (
        open_study(out, small_recipe(), {"processor": "A"}, settings(rounds=2), points),
        pytest.raises(RunError, match="Another process is measuring"),
    ):
        opened(out)
    opened(out)


def test_another_network_may_be_asked_for_when_going_on(tmp_path: Path) -> None:
    opened(tmp_path / "scale")
    network: dict[str, Any] = {
        "bandwidth_bytes_per_second": 1e9,
        "latency_seconds": 1e-4,
    }
    study = opened(tmp_path / "scale", nodes_up_to=4, **network)
    assert study.settings.nodes_up_to == 4


def test_a_finished_or_foreign_directory_is_never_overwritten(tmp_path: Path) -> None:
    out, foreign = tmp_path / "scale", tmp_path / "foreign"
    opened(out).save(Analysis())
    before = (out / "scaling.json").read_bytes()
    with pytest.raises(RunError, match="is a finished study"):
        opened(out)
    assert (out / "scaling.json").read_bytes() == before
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"it has no scaling\.json"):
        opened(foreign)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda text: text.replace('"points": [', '"points": 3, "was": ['),
        lambda text: text.replace('"version": 1', '"version": "x"'),
        lambda text: text.replace(
            '"samples_per_second": 960.0', '"samples_per_second": NaN'
        ),
        lambda text: text.replace('"steps": 10', '"steps": 0'),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any) -> None:
    study = opened(tmp_path / "scale")
    point = next(iter(study.runs))
    study.add(point, measure.combine(1, [fake_report()]))
    study.save()
    file = tmp_path / "scale" / "scaling.json"
    text = file.read_text()
    damaged = damage(text)
    assert damaged != text
    file.write_text(damaged)
    with pytest.raises(RunError, match=r"scaling\.json is damaged"):
        read(file)


def test_trainings_at_the_same_time_add_up() -> None:
    measurement = measure.combine(3, [fake_report(10), fake_report(20)])
    assert measurement.samples_per_second == 1920
    assert measurement.steps == 15
    assert len(measurement.workers) == 2


# On real workers


TINY = (
    *("--set", "data.train_samples=1000", "--set", "model.hidden=[37,19]"),
    *("--set", "micro_batches=4", "--global-batch", "96"),
    *("--workers", "1,2", "--rounds", "2", "--seconds", "0.05"),
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "samestep", "scale", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_command_measures_predicts_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "scale"
    network = ("--nodes-up-to", "4", "--bandwidth", "10Gbit", "--latency", "50us")
    ended = run(*TINY, *network, "--weak", "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    assert "2 workers: " in ended.stdout
    assert "\x1b" not in ended.stdout + ended.stderr
    content = json.loads((out / "scaling.json").read_text())
    assert content["status"] == "finished"
    kinds = Counter(point["kind"] for point in content["points"])
    assert kinds == {"strong": 2, "limit": 1, "weak": 2}
    for point in content["points"]:
        assert [run["round"] for run in point["runs"]] == [1, 2]
        assert all(len(run["workers"]) == point["workers"] for run in point["runs"])
        assert point["samples_per_second"] > 0
    assert content["model"]["parameters"]
    assert any(line["nodes"] == 4 for line in content["predictions"])
    rows = list(csv.DictReader((out / "scaling.csv").read_text().splitlines()))
    assert len(rows) == 5
    assert float(rows[0]["samples_per_second"]) > 0
    figures = {path.name for path in (out / "report-figures").iterdir()}
    assert {"speedup-strong.png", "speedup-strong.svg"} <= figures

    again = run(*TINY, "--out", str(out))
    assert again.returncode == 2
    assert "is a finished study" in again.stderr


def test_gloo_is_measured_too(tmp_path: Path, server: ForkServer) -> None:
    recipe = small_recipe()
    fields: dict[str, Any] = {"exchange": "gloo", "rounds": 2, "seconds": 0.05}
    wanted = from_options(recipe, 2, **fields)
    path, analysis = scale.scale(
        recipe, wanted, server, lambda *_: None, tmp_path / "scale"
    )
    assert {point.exchange for point in analysis.points} == {"gloo"}
    assert read(path / "scaling.json").environment["machine"] == describe()["machine"]


def test_help_is_there_without_slow_imports() -> None:
    code = (
        "import sys; from samestep.cli.main import cli\n"
        "try: cli(['scale', '--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'scipy', 'matplotlib') if n in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ended.stdout.endswith("[]\n")
    assert "--nodes-up-to" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", "2,1"), "increasing positive numbers"),
        (("--workers", "1,99"), "99 workers cannot share"),
        (("--nodes-up-to", "4"), "--bandwidth"),
        (("--bandwidth", "fast"), "such as `10Gbit`"),
        (("--workers", ""), "increasing positive numbers"),
    ],
)
def test_bad_requests_end_with_code_2(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ended = run(*arguments, "--out", str(tmp_path / "scale"))
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (tmp_path / "scale").exists()
