"""The schema of a run's files: the writer, the readers and the documents share it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, small_recipe
from pydantic import BaseModel, ValidationError
from report_samples import result

from samestep.output.schema import Epoch, Result, Step


PAGE = Path(__file__).parents[1] / "docs" / "reference" / "run-directory.md"
RECORDS: dict[str, type[BaseModel]] = {"result": Result, "epoch": Epoch, "step": Step}


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_takes_its_tables_from_the_schema(name: str) -> None:
    assert f"```{{records}} {name}\n```" in PAGE.read_text()
    fields = RECORDS[name].model_fields.values()
    assert all(field.description for field in fields)


def unnamed(record: dict[str, Any], model: type[BaseModel]) -> set[str]:
    """Return the keys of a record that its schema does not name."""
    return set(record) - set(model.model_fields) - {"type"}


def test_the_schema_names_every_field_that_a_training_writes(train: Train) -> None:
    run = train(small_recipe(epochs=1), workers=2)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["type"] == "step"]
    epochs = [*run.history, *(r for r in records if r["type"] == "epoch")]
    assert steps
    assert not unnamed(dict(run.result), Result)
    assert not set().union(*(unnamed(record, Step) for record in steps))
    assert not set().union(*(unnamed(record, Epoch) for record in epochs)) - {"at"}


def test_a_result_of_an_older_version_can_lack_the_newer_fields() -> None:
    old = Result.model_validate({"recipe": {}, "status": "finished"})
    assert (old.epochs, old.weights_sha256, old.metrics) == ([], None, ["accuracy"])


@pytest.mark.parametrize(
    "fields", [{"status": "Finished!"}, {"weights_sha256": "x"}, {"restarts": -1}]
)
def test_a_wrong_field_of_a_result_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Result.model_validate(result(**fields))


def test_an_older_run_may_have_own_metrics_of_the_names_of_later_fields() -> None:
    old = result(own_metrics=["confusion"], test_confusion=0.5, test_worst=0.1)
    assert Result.model_validate(old).test_confusion == []
