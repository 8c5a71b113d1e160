"""Reports on runs that are not as they should be, and on hostile ones."""

import json
import re
from pathlib import Path
from typing import Any

import docx
import pytest
from report_samples import RECIPE, epoch, point, step, write_run, write_scaling
from test_cli import samestep
from test_report import Page

from samestep import report
from samestep.errors import OutputError, RunError, UsageError


HOSTILE = "</script></title><img src=x onerror=alert(1)>\x1b[31m\u202e'\"{{7*7}}$x_1$"
SHOWN = "</script></title><img src=x onerror=alert(1)>\\x1b[31m\\u202e'\"{{7*7}}$x_1$"


def assert_harmless(path: Path) -> Page:
    """Assert that nothing of HOSTILE is markup, and all of it can be read."""
    page = Page(path)
    assert SHOWN in page.text
    assert not [image for image in page.all("img") if "onerror" in image]
    assert not page.all("script")
    assert len(page.all("title")) == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page.source)
    return page


def test_hostile_texts_of_a_run_are_shown_and_not_executed(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run<img src=x onerror=alert(1)>",
        status="failed",
        error=HOSTILE,
        recipe=RECIPE | {"name": HOSTILE, HOSTILE: HOSTILE},
        placement={"exchange": HOSTILE, "workers": HOSTILE},
        epochs=[epoch(1, seconds_by_phase={HOSTILE: 1.0}, workers=[{HOSTILE: 1.0}])],
    )
    with (run / "events.jsonl").open("a") as file:
        event = {"seconds": 9.0, "event": "failed", "error": HOSTILE}
        file.write(json.dumps(event) + "\n")
        file.write(json.dumps(event | {"event": HOSTILE}) + "\n")
    environment = {"processor": HOSTILE, "libraries": {HOSTILE: HOSTILE}}
    (run / "environment.json").write_text(json.dumps(environment))
    page = assert_harmless(report.write(run, docx=True))
    assert "run<img src=x onerror=alert(1)>" in page.text
    word = docx.Document(str(run / "report.docx"))
    assert any(SHOWN in paragraph.text for paragraph in word.paragraphs)


def test_hostile_texts_of_a_scaling_are_shown_and_not_executed(tmp_path: Path) -> None:
    measured = write_scaling(
        tmp_path / "measured",
        recipe={"name": HOSTILE},
        status=HOSTILE,
        advice=[HOSTILE],
        no_fit_because=HOSTILE,
        settings={"exchange": HOSTILE},
        points=[point("strong", n, 64, float(n)) for n in (1, 2)],
    )
    assert_harmless(report.write(measured, docx=True))


def test_hostile_texts_in_a_comparison_are_shown_and_not_executed(
    tmp_path: Path,
) -> None:
    runs = [
        write_run(tmp_path / name, recipe={"name": HOSTILE, "seed": name})
        for name in ("a", "b\x1b<img onerror=x>")
    ]
    for run in runs:
        (run / "environment.json").write_text(
            json.dumps({"system": [HOSTILE, str(run)]})
        )
    assert_harmless(report.compare(runs, tmp_path / "c.html"))


def test_a_run_still_going_is_reported_on_as_far_as_it_is(tmp_path: Path) -> None:
    page = Page(report.write(write_run(tmp_path / "run", ended=False)))
    assert "This training has not finished" in page.text
    assert "up to step 645" in page.text
    assert "unfinished" in page.text
    assert page.all("svg")


def test_a_last_line_that_is_being_written_is_not_damage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ended=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "ep')
    assert "cannot be read" not in Page(report.write(run)).text


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step"\n[1, 2]\n{"type": "step", "step": "x"}\n\x00\n')
    text = Page(report.write(run)).text
    assert "4 lines of metrics.jsonl cannot be read" in text


def test_a_failed_run_says_so_first(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        status="failed",
        error="Worker 1 was killed.",
        test_accuracy=float("nan"),
        epochs=[epoch(1)],
    )
    page = Page(report.write(run))
    assert "This training failed after 1 whole epoch: Worker 1 was killed." in page.text


def test_numbers_that_are_not_finite_are_named_and_not_drawn(tmp_path: Path) -> None:
    bad = [float("nan"), float("inf"), None]
    run = write_run(
        tmp_path / "run",
        test_loss=float("inf"),
        test_accuracy=None,
        epochs=[epoch(n + 1, train_loss=bad[n], seconds=bad[n]) for n in range(3)],
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(
            json.dumps(step(646 + n, 3, loss=bad[n], noise_scale=None, lr=bad[n]))
            + "\n"
            for n in range(3)
        )
    page = Page(report.write(run))
    assert "not finite" in page.text
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))
    assert "nan" not in drawn.lower()


def test_a_run_of_an_older_version_lacks_some_blocks_and_is_shown(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").write_text(
        json.dumps({"recipe": RECIPE, "status": "finished", "epochs": [{"epoch": 1}]})
    )
    page = Page(report.write(run))
    assert "Classes" not in page.text
    assert "environment.json is missing or damaged" in page.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is neither a run nor a scaling"),
        ({"notes.txt": "hello"}, "is neither a run nor a scaling"),
        ({"recipe.toml": ""}, "no step in metrics.jsonl"),
        ({"result.json": "{", "recipe.toml": ""}, "is not valid JSON"),
        ({"result.json": "[" * 100_000}, "is not valid JSON"),
        ({"result.json": "[]"}, "result.json is damaged"),
        ({"result.json": '{"status": "finished"}'}, "damaged: recipe: field required"),
        ({"scaling.json": "{"}, "is not valid JSON"),
        ({"scaling.json": '{"version": 1}'}, "scaling.json is damaged: recipe"),
        (
            {"scaling.json": '{"version": 2, "recipe": {}, "status": "finished"}'},
            "version",
        ),
    ],
)
def test_what_cannot_be_reported_on_is_refused_with_a_remedy(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=message) as refused:
        report.write(tmp_path)
    assert re.search("`samestep|later", str(refused.value))
    assert not (tmp_path / "report.html").exists()


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    ended = samestep("report", str(tmp_path / "nowhere"))
    assert ended.returncode == 2
    assert "There is no run directory" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_several_runs_need_the_flag_and_a_comparison_needs_several(
    tmp_path: Path,
) -> None:
    run = str(write_run(tmp_path / "run"))
    ended = samestep("report", run, run)
    assert ended.returncode == 2
    assert "--compare" in ended.stderr
    with pytest.raises(UsageError, match="two runs or more; received 1"):
        report.compare([run])


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"page\.html cannot be written"):
        report.write(write_run(tmp_path / "run"), tmp_path / "file" / "page.html")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"points": []}, "No speed-up has been measured yet."),
        ({"points": [point("strong", 1, 64, 1.0)]}, "at least two measured numbers"),
        ({"no_fit_because": "one point only."}, "No model was fitted: one point only."),
        ({"status": "measuring"}, "These measurements have not finished"),
    ],
)
def test_a_scaling_without_a_fit_says_what_is_missing(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    nothing = dict.fromkeys(("model", "held_out", "noise"))
    measured = write_scaling(tmp_path, **{**nothing, "predictions": [], **fields})
    assert message in Page(report.write(measured)).text


def test_numbers_of_a_scaling_that_are_not_finite_are_named(tmp_path: Path) -> None:
    nan = float("nan")
    points = [
        point("strong", 1, 64, 1.0),
        point("strong", 2, 64, nan, limit_speedup=nan, efficiency_of_limit=None),
        point("strong", 3, 64, 2.5, speedup_low=nan, speedup_high=None),
    ]
    measured = write_scaling(tmp_path, points=points, model=None)
    page = Page(report.write(measured))
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))
    assert "nan" not in drawn.lower()
    assert "not finite" in page.text
