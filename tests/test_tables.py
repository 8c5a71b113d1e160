"""Tables: what becomes of columns, and what is wrong with them."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import columns, csv_file, parquet_file

from samestep.config.data import TableData
from samestep.data import dataset
from samestep.data.sources import tables
from samestep.errors import DataError


def section(fields: dict[str, Any]) -> TableData:
    return TableData.model_validate(fields)


def test_numbers_are_standardised_and_words_are_counted_out(tmp_path: Path) -> None:
    recipe = section(csv_file(tmp_path / "a"))
    data = dataset.load(recipe)
    # width, count, three colours, old or not
    assert data.inputs == (7,)
    assert data.outputs == 3
    train = data.splits["train"]
    inputs, _ = train.gather(torch.arange(len(train)))
    assert inputs[:, :2].mean(dim=0) == pytest.approx([0, 0], abs=1e-5)
    assert inputs[:, :2].std(dim=0, correction=0) == pytest.approx([1, 1], abs=1e-4)
    table = columns()
    rows = tables.read(recipe).inputs(np.arange(len(table["id"])))
    for index, word in enumerate(("blue", "green", "red")):
        assert rows[:, 2 + index].tolist() == [c == word for c in table["colour"]]
    assert rows[:, 6].tolist() == table["is_old"]


def test_classes_are_sorted_numbers_as_numbers(tmp_path: Path) -> None:
    fields = csv_file(tmp_path / "a", columns() | {"kind": [9, 10, -1] * 30})
    table = tables.read(section(fields))
    assert table.classes == ["-1", "9", "10"]
    assert table.targets()[:3].tolist() == [1, 2, 0]


def test_whole_numbers_are_a_regression_if_the_recipe_says_so(tmp_path: Path) -> None:
    fields = csv_file(tmp_path / "a", columns() | {"kind": [9, 10, -1] * 30})
    data = dataset.load(section(fields | {"task": "regression"}))
    assert (data.task, data.outputs) == ("regression", 1)
    _, targets = data.splits["test"].gather(torch.arange(2))
    assert targets.shape == (2, 1)
    assert targets.dtype == torch.float32


def test_missing_values_are_the_training_mean_or_no_word(tmp_path: Path) -> None:
    recipe = section(parquet_file(tmp_path / "a"))
    table = tables.read(recipe)
    rows = table.inputs(np.arange(50))
    names = [column.name for column in table.features]
    assert rows[3, names.index("width")] == 0
    first = names.index("colour")
    assert rows[5, first : first + 3].tolist() == [0, 0, 0]
    assert rows[:90].tolist() == rows[90:].tolist()
    assert tables.TableSource(recipe).describe()["missing"] == 4


def changed(**changes: Any) -> dict[str, list[Any]]:
    """Other columns, or values of rows: `column=[(row, value), ...]`."""
    table: dict[str, list[Any]] = columns()
    for name, values in changes.items():
        if isinstance(values[0], tuple):
            for row, value in values:
                table[name][row] = value
        else:
            table[name] = values
    return table


NAMES = [f"name {i}" for i in range(90)]
BAD: dict[str, tuple[dict[str, list[Any]], dict[str, Any], str]] = {
    "target": (columns(), {"target": "knid"}, "no column `knid`. Did you mean `kind`"),
    "ignore": (columns(), {"ignore": ["idd"]}, "no column `idd`. Did you mean `id`"),
    "missing": (
        changed(width=[(3, None), (7, None)]),
        {},
        "column `width` lacks 2 of 90",
    ),
    "missing-word": (changed(colour=[(3, None)]), {}, "`colour` lacks 1 of 90"),
    "missing-target": (changed(kind=[(1, None)]), {}, "`kind` is missing in 1 of 90"),
    "empty-column": (
        changed(width=[None] * 90),
        {"missing": "mean"},
        "`width` is empty",
    ),
    "infinite": (changed(width=[(3, float("inf"))]), {}, "finite; column `width`"),
    "one-class": (changed(kind=["a"] * 90), {}, "`kind` has only a"),
    "words-to-predict": (columns(), {"task": "regression"}, "`kind` holds words"),
    "nothing-left": (
        columns(),
        {"ignore": [n for n in columns() if n != "kind"]},
        "no column besides the target",
    ),
    "suffix": (columns(), {"path": "table.xls"}, "ends with .csv or .parquet"),
    "nowhere": (columns(), {"path": "nowhere.csv"}, "nowhere.csv cannot be read"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_wrong_with_a_table_is_said_with_its_column(
    tmp_path: Path, bad: str
) -> None:
    table, fields, message = BAD[bad]
    recipe = section(csv_file(tmp_path / "a", table) | fields)
    with pytest.raises(DataError, match=message):
        dataset.load(recipe)


def test_too_many_words_are_no_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_WORDS", 50)
    recipe = section(csv_file(tmp_path / "a") | {"ignore": []})
    with pytest.raises(DataError, match="`id` has 90 different words, more than 50"):
        dataset.load(recipe)
    fields = {"target": "id", "ignore": ["kind"]}
    with pytest.raises(DataError, match="`id` has 90 different values, too many"):
        dataset.load(section(csv_file(tmp_path / "a") | fields))


TESTS: dict[str, tuple[dict[str, list[Any]], str]] = {
    "class": (changed(kind=[(0, "dog")]), "`kind` has `dog` only in the test"),
    "type": (changed(width=NAMES), "`width` holds numbers in one of"),
    "column": ({"kind": ["ant"], "id": [1]}, "b.csv has no `width`"),
}


@pytest.mark.parametrize("bad", TESTS)
def test_a_table_for_the_test_is_like_that_for_training(
    tmp_path: Path, bad: str
) -> None:
    table, message = TESTS[bad]
    fields = csv_file(tmp_path / "a")
    fields["test_path"] = csv_file(tmp_path / "b", table)["path"]
    with pytest.raises(DataError, match=message):
        dataset.load(section(fields))


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    for name, content in (
        ("a.csv", "x,y\n1,2\n3\n"),
        ("b.csv", "x,y\n"),
        ("c.parquet", "x"),
    ):
        (tmp_path / name).write_text(content)
        fields = {"source": "table", "path": str(tmp_path / name), "target": "x"}
        with pytest.raises(DataError, match=f"{name} (is not a table|has no rows)"):
            dataset.load(section(fields))


def test_without_pyarrow_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = section(csv_file(tmp_path / "a"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'samestep\[data\]'"):
        tables.read(recipe)
