"""Read run directories and scaling studies: finished, running, failed or damaged."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from samestep.document.formatting import plural
from samestep.errors import RunError
from samestep.files.untrusted import check_depth, check_parts, parse_json, read_text
from samestep.output.run import LOOP_FILE, RECIPE_FILE, is_of_loop, what_continues
from samestep.output.schema import (
    Epoch,
    Evaluation,
    Event,
    Record,
    Result,
    Scaling,
    Step,
    first_error,
)
from samestep.system.json_values import JsonObject


SCALING_FILE = "scaling.json"
R = TypeVar("R", bound=Record)
T = TypeVar("T")


@dataclass(frozen=True)
class RunFiles:
    """The content of a run directory."""

    path: Path
    result: Result
    """Without a result.json, the fields that the other files have."""
    steps: list[Step]
    events: list[Event]
    environment: JsonObject
    notices: list[str]
    """What a reader must know first."""
    is_of_loop: bool
    """Whether the training loop was the user's own, so that there is no recipe."""


def read_scaling(path: Path) -> Scaling:
    """Read a scaling.json or the one in a directory. Raises RunError."""
    file = path
    if not path.is_file():
        check_parts(path)
        file = path / SCALING_FILE
    remedy = "Give a scaling.json that `samestep scale` wrote, or measure again."
    return _read(Scaling, file, remedy)


def read_run(path: Path) -> RunFiles:
    """Read a run directory. Raises RunError if it has nothing to show."""
    _check_directory(path)
    check_parts(path)
    records, damage = _read_lines(path / "metrics.jsonl", _metric)
    events, damage_of_events = _read_lines(path / "events.jsonl", Event.model_validate)
    steps = [record for record in records if isinstance(record, Step)]
    epochs = [record for record in records if isinstance(record, Epoch)]
    evaluations = [record for record in records if isinstance(record, Evaluation)]
    file = path / "result.json"
    if file.exists():  # it is written last: without it the run is not over
        result = _read(Result, file, f"Write it again with {what_continues(path)}.")
        notices = _verdict(result)
    else:
        result = _unfinished(path, steps, epochs, events)
        result = result.model_copy(update={"evaluations": evaluations})
        notices = [
            "This training has not finished: it is still running, or was killed. The "
            f"report shows what it recorded up to step {steps[-1].step:,}. If it is "
            f"no longer running, {what_continues(path)} continues it."
        ]
    environment = _read_object(path / "environment.json", parse_json)
    notices += damage + damage_of_events
    is_loop = is_of_loop(path)
    return RunFiles(path, result, steps, events, environment, notices, is_loop)


def _unfinished(
    path: Path, steps: list[Step], epochs: list[Epoch], events: list[Event]
) -> Result:
    """Return a result from the other files of a run. Raises RunError without steps."""
    if not steps:
        raise RunError(
            f"{path} has no result.json and no step in metrics.jsonl: the training has "
            "just begun, or was killed before its first step. Report on it later, or "
            f"continue it with {what_continues(path)}."
        )
    name = LOOP_FILE if is_of_loop(path) else RECIPE_FILE
    return Result(
        recipe=_read_object(path / name, tomllib.loads),
        placement=_placement(events),
        status="unfinished",
        epochs=epochs,
        restarts=sum(event.event == "restart" for event in events),
    )


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise RunError(
            f"There is no run directory {path}. Give a directory that `samestep train` "
            "or `samestep scale` wrote."
        )
    if not any(
        (path / name).is_file()
        for name in ("result.json", "metrics.jsonl", RECIPE_FILE)
    ):
        raise RunError(
            f"{path} is neither a run nor a scaling study: it has no result.json, no "
            "metrics.jsonl and no scaling.json. Give a directory that `samestep train` "
            "or `samestep scale` wrote."
        )


def _verdict(result: Result) -> list[str]:
    if result.status == "finished":
        return []
    done = f"after {plural(len(result.epochs), 'whole epoch')}"
    if result.status == "failed":
        reason = result.error or "no reason was recorded"
        return [f"This training failed {done}: {reason}"]
    return [f"This training ended early ({result.status}) {done}."]


def _metric(line: JsonObject) -> Record:
    kinds: dict[str, type[Step] | type[Epoch] | type[Evaluation]]
    kinds = {"step": Step, "epoch": Epoch, "evaluation": Evaluation}
    return kinds[line["type"]].model_validate(line)


def _read_lines(
    path: Path, parse: Callable[[JsonObject], T]
) -> tuple[list[T], list[str]]:
    """Return the records, and a notice if lines are damaged."""
    records: list[T] = []
    lost = 0
    for line in _text(path).splitlines(keepends=True):
        try:
            records.append(parse(parse_json(line)))
        except (ValueError, KeyError, TypeError):
            # The last line of a run that is still written may be cut: not damage.
            lost += line.endswith("\n")
    if not lost:
        return records, []
    lines = plural(lost, "line")
    notice = f"{lines} of {path.name} cannot be read and are left out of this report."
    return records, [notice]


def _text(path: Path) -> str:
    try:
        return read_text(path, "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunError(
            f"{path} cannot be read: {error.strerror}. Make it readable."
        ) from None


def _read(kind: type[R], file: Path, remedy: str) -> R:
    try:
        return kind.model_validate(parse_json(_text(file)))
    except ValidationError as error:
        raise RunError(f"{file} is damaged: {first_error(error)}. {remedy}") from None
    except ValueError as error:
        raise RunError(f"{file} is not valid JSON: {error}. {remedy}") from None


def _read_object(path: Path, parse: Callable[[str], Any]) -> JsonObject:
    """Return {} if the file is missing or damaged: the rest is worth showing."""
    try:
        content = parse(_text(path))
        check_depth(content)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _placement(events: list[Event]) -> JsonObject:
    starts = [event for event in events if event.event in ("started", "resumed")]
    if not starts:
        return {}
    return {name: starts[-1].get(name) for name in ("workers", "exchange")}
