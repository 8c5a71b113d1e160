"""Tables, CSV or Parquet, of which one column is predicted.

Numbers are standardised with the mean and the standard deviation of the training
samples; words become one column for each different word, in sorted order (one-hot).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samestep.config.data import TableData
from samestep.data.sources.source import (
    Array,
    Source,
    describe_files,
    library,
    reading,
)
from samestep.errors import DataError, did_you_mean
from samestep.files.untrusted import check_regular
from samestep.system.json_values import JsonObject


if TYPE_CHECKING:
    import pyarrow as pa


MOST_WORDS = 1000
"""Different words in one column."""


@dataclass(frozen=True)
class Column:
    """One column of all samples."""

    name: str
    values: Array
    """float64 [n], NaN where a value is missing; or str [n], "" where one is."""
    is_missing: NDArray[np.bool_]

    @property
    def is_number(self) -> bool:
        """Whether the values are numbers, not words."""
        return self.values.dtype.kind == "f"


@dataclass(frozen=True)
class Table:
    """A table; the rows of the test's file come last."""

    features: list[Column]
    target: Column
    is_regression: bool
    num_first: int
    """The number of rows of the first file."""
    classes: list[str] = field(default_factory=list)
    """Sorted: numbers by value, words by code point."""

    def __len__(self) -> int:
        return len(self.target.values)

    def targets(self) -> Array:
        """Return float64 [n] values, or int64 [n] classes."""
        if self.is_regression:
            return self.target.values
        known = np.unique(self.target.values[: self.num_first])
        return np.searchsorted(known, self.target.values)

    def inputs(self, train: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return inputs [n, features], standardized by the samples `train`."""
        columns: list[Array] = []
        for column in self.features:
            if column.is_number:
                columns.append(_standardised(column, train))
            else:
                columns += _one_hot(column)
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class TableSource(Source):
    recipe: TableData

    def describe(self) -> JsonObject:
        """Return sizes, checksums, and what the columns are. Raises DataError."""
        recipe, table = self.recipe, read(self.recipe)
        files = recipe.path, recipe.test_path
        return describe_files("table", files) | {
            "rows": len(table),
            "columns": [c.name for c in table.features],
            "missing": int(sum(c.is_missing.sum() for c in table.features)),
            "classes": table.classes,
        }


def read(recipe: TableData) -> Table:
    """Read the table, and that of the test if there is one. Raises DataError."""
    files = [Path(name) for name in (recipe.path, recipe.test_path) if name]
    tables = [_file(path) for path in files]
    names = tables[0].column_names
    _check_names(recipe, tables[0], files[0])
    for name in names:
        if name not in tables[-1].column_names:
            raise DataError(
                f"Both tables have the same columns; {files[-1]} has no `{name}`."
            )
    kept = [name for name in names if name not in recipe.ignore]
    columns = {name: _column(name, tables, files, recipe) for name in kept}
    target = columns.pop(recipe.target)
    if target.is_missing.any():
        raise DataError(
            f"Every row has a target; `{recipe.target}` is missing in "
            f"{int(target.is_missing.sum())} of {len(target.values)} rows."
        )
    is_regression = _is_regression(recipe, target, tables[0])
    classes = [] if is_regression else _classes(target, tables[0].num_rows)
    return Table(
        list(columns.values()), target, is_regression, tables[0].num_rows, classes
    )


def _file(path: Path) -> "pa.Table":
    if path.suffix not in (".csv", ".parquet"):
        raise DataError(
            f"A table is a file that ends with .csv or .parquet; received {path}."
        )
    pyarrow = library("pyarrow", "Tables are read by pyarrow")
    try:
        with reading(path):
            check_regular(path)
            table = _csv(path) if path.suffix == ".csv" else _parquet(path)
        table.column_names  # noqa: B018  raises where they are not UTF-8
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a table: {error}.") from None
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows.")
    return table


def _csv(path: Path) -> "pa.Table":
    from pyarrow import csv

    # An empty word is a missing value, as in columns of numbers.
    convert = csv.ConvertOptions(strings_can_be_null=True)
    options = csv.ReadOptions(use_threads=False)
    return csv.read_csv(path, options, convert_options=convert)


def _parquet(path: Path) -> "pa.Table":
    """Read a Parquet file; `read_table` would do, but its imports take a second."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read(use_threads=False)


def _check_names(recipe: TableData, table: "pa.Table", path: Path) -> None:
    names = table.column_names
    for name in (recipe.target, *recipe.ignore):
        if name not in names:
            raise DataError(
                f"{path} has no column `{name}`.{did_you_mean(name, names)} It has: "
                f"{', '.join(names)}."
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has more than one column `{twice}`.")
    if set(names) <= {recipe.target, *recipe.ignore}:
        raise DataError(f"{path} has no column besides the target to predict it from.")


def _column(
    name: str, tables: Sequence["pa.Table"], files: Sequence[Path], recipe: TableData
) -> Column:
    parts = [_values(name, t, p) for t, p in zip(tables, files, strict=True)]
    if len({part.dtype.kind for part in parts}) > 1:
        raise DataError(
            f"Column `{name}` holds numbers in one of {files[0]} and {files[1]}, and "
            "words in the other."
        )
    values = np.concatenate(parts)
    missing = np.isnan(values) if values.dtype.kind == "f" else values == ""
    column = Column(name, values, missing)
    if name != recipe.target:
        if missing.any() and recipe.missing == "error":
            raise DataError(
                f"Every value must be there, and column `{name}` lacks "
                f"{int(missing.sum())} of {len(values)}. Fill them, leave the column "
                f'out with `data.ignore`, or set `data.missing = "mean"`.'
            )
        _check_feature(column)
    return column


def _values(name: str, table: "pa.Table", path: Path) -> Array:
    """Return float64 [n] with NaN, or str [n] with "", for missing values."""
    from pyarrow import types

    column = table[name]
    kind = column.type
    if types.is_dictionary(kind):
        column = column.combine_chunks().dictionary_decode()
        kind = column.type
    if types.is_integer(kind) or types.is_floating(kind):
        numbers = column.to_numpy(zero_copy_only=False)
        return np.asarray(numbers, np.float64)
    if types.is_null(kind):
        return np.full(len(column), np.nan)
    if types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind):
        words = column.to_pylist()
        return np.array(["" if w is None else str(w) for w in words], np.str_)
    raise DataError(
        f"The columns of a table hold numbers, words or true and false; `{name}` of "
        f"{path} holds {kind}. Leave it out: `data.ignore`."
    )


def _check_feature(column: Column) -> None:
    if column.is_missing.all():
        raise DataError(
            f"Column `{column.name}` is empty. Leave it out: `data.ignore`."
        )
    if column.is_number:
        if np.isinf(column.values).any():
            raise DataError(f"Numbers are finite; column `{column.name}` has others.")
    elif len(np.unique(column.values)) > MOST_WORDS:
        raise DataError(
            f"Column `{column.name}` has {len(np.unique(column.values)):,} different "
            f"words, more than {MOST_WORDS:,}: is it a name or a text? Leave it out: "
            "`data.ignore`."
        )


def _is_regression(recipe: TableData, target: Column, table: "pa.Table") -> bool:
    """Return whether to predict a quantity; by default whole numbers are classes."""
    from pyarrow import types

    if recipe.task == "regression" and not target.is_number:
        raise DataError(f"A regression predicts a number; `{target.name}` holds words.")
    if recipe.task is not None:
        return recipe.task == "regression"
    return target.is_number and bool(types.is_floating(table[target.name].type))


def _classes(target: Column, num_first: int) -> list[str]:
    """Return the first file's classes. Raises DataError if the second has others."""
    first, second = target.values[:num_first], target.values[num_first:]
    known = np.unique(first)
    names = [_class_name(value) for value in known.tolist()]
    if len(known) < 2:
        raise DataError(
            f"There are at least 2 classes; `{target.name}` has only {names[0]}."
        )
    if len(known) > MOST_WORDS:
        raise DataError(
            f"`{target.name}` has {len(known):,} different values, too many for "
            'classes. If it is a quantity, set `data.task = "regression"`.'
        )
    for value in np.setdiff1d(second, known).tolist():
        raise DataError(
            f"The test has the classes of the first table; `{target.name}` has "
            f"`{_class_name(value)}` only in the test."
        )
    return names


def _class_name(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.17g}"


def _standardised(column: Column, train: NDArray[np.int64]) -> Array:
    known = column.values[train][~column.is_missing[train]]
    if len(known) == 0:
        raise DataError(f"Column `{column.name}` is missing in all training samples.")
    # fsum, since the order in which numpy adds depends on the processor.
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((known - mean) ** 2) / len(known))
    values = (column.values - mean) / (deviation or 1.0)
    return np.where(column.is_missing, 0.0, values)


def _one_hot(column: Column) -> list[Array]:
    """Return a column for each word; a missing word is 0 in all of them."""
    words = np.unique(column.values[~column.is_missing])
    return [(column.values == word).astype(np.float64) for word in words]
