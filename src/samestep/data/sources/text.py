"""Characters of UTF-8 text: one file, or all files of a folder in the order of paths.

The text is cut into windows of `context` characters, or into lines of at most as many.
A sample's targets are its window moved on by one. The last windows are held out, since
neighbours resemble each other.
"""

import gzip
import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samestep.config.data import TextData
from samestep.data.sources.source import Source, reading
from samestep.errors import DataError
from samestep.files.untrusted import read_text
from samestep.system.json_values import JsonObject


@dataclass(frozen=True)
class Text:
    """A text as numbers."""

    tokens: NDArray[np.int32]
    """[n] positions in the vocabulary."""
    vocabulary: str
    """All different characters, in the order of their code points."""
    windows: dict[str, tuple[int, int]]
    """The range of windows of each split."""
    starts: NDArray[np.int64]
    """Where each window begins."""
    lengths: NDArray[np.int64]
    """How many targets each of them has."""

    def of_split(self, name: str) -> NDArray[np.int32]:
        """Return all characters of a split, in order."""
        first, end = self.windows[name]
        after = self.starts[end - 1] + self.lengths[end - 1] + 1
        return self.tokens[self.starts[first] : after]

    def written(self, tokens: NDArray[np.int32]) -> str:
        """Return tokens as text again."""
        codes = np.array([ord(character) for character in self.vocabulary], "<u4")
        return codes[tokens].tobytes().decode("utf-32-le")


@dataclass(frozen=True)
class TextSource(Source):
    recipe: TextData

    def describe(self) -> JsonObject:
        """Return size, checksum, vocabulary, and what simple methods reach in the test.

        Raises DataError.
        """
        text = read(self.recipe)
        whole = text.written(text.tokens)
        return {
            "source": "text",
            "path": self.recipe.path,
            "characters": len(whole),
            "sha256": hashlib.sha256(whole.encode()).hexdigest(),
            "vocabulary": text.vocabulary,
            "baselines": baselines(text),
        }


def read(recipe: TextData) -> Text:
    """Read the text as numbers.

    Raises DataError where a file is missing or not UTF-8, or the text too short.
    """
    written = _joined(_read_files(recipe), recipe.lines)
    codes = np.frombuffer(written.encode("utf-32-le"), np.uint32)
    known, tokens = np.unique(codes, return_inverse=True)
    starts, lengths = _cut(codes, recipe)
    count = len(starts)
    held_out = math.ceil(recipe.held_out * count)
    if count - 2 * held_out < 1 or held_out < 1:
        raise DataError(
            "A text must fill some windows for training, validation and test: "
            f"`data.path` has {len(codes):,} characters, {count} windows of "
            f"`data.context` = {recipe.context}. Use a longer text or a shorter window."
        )
    cuts = count - 2 * held_out, count - held_out, count
    return Text(
        tokens.astype(np.int32),
        "".join(map(chr, known)),
        {"train": (0, cuts[0]), "validation": cuts[:2], "test": cuts[1:]},
        starts,
        lengths,
    )


def _joined(texts: list[str], has_lines: bool) -> str:
    """Join files; with lines, each line begins after a line break and ends with one."""
    if not has_lines:
        return "".join(texts)
    return "\n".join(["", *(text.removesuffix("\n") for text in texts), ""])


def _cut(
    codes: NDArray[np.uint32], recipe: TextData
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each window begins, and how many targets it has.

    The first character of a line and the line break at its end are targets, too.
    """
    context = recipe.context
    if not recipe.lines:
        starts = np.arange(max(0, len(codes) - 1) // context) * context
        return starts, np.full_like(starts, context)
    (breaks,) = (codes == ord("\n")).nonzero()
    has_characters = np.diff(breaks) > 1
    first, end = breaks[:-1][has_characters], breaks[1:][has_characters]
    pieces = -(-(end - first) // context)
    number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    starts = np.repeat(first, pieces) + context * number
    return starts, np.minimum(context, np.repeat(end, pieces) - starts)


def baselines(text: Text) -> dict[str, float]:
    """Return the bits per character that simple methods need for the test split.

    `unigram`: the characters' frequencies in the training split (Shannon 1948), each
    plus one; `gzip`: the test split alone, at level 9.
    """
    train, test = text.of_split("train"), text.of_split("test")
    counts = np.bincount(train, minlength=len(text.vocabulary)) + 1
    bits = -np.log2(counts / counts.sum())
    packed = 8 * len(gzip.compress(text.written(test).encode(), 9, mtime=0))
    return {"unigram": float(bits[test].mean()), "gzip": packed / len(test)}


def _read_files(recipe: TextData) -> list[str]:
    is_python = recipe.path == "python"  # the directory of its standard library
    path = Path(sysconfig.get_path("stdlib") if is_python else recipe.path)
    texts = []
    for file in _files(path, recipe.pattern):
        try:
            with reading(file):
                texts.append(read_text(file))
        except UnicodeDecodeError as error:
            raise DataError(
                f"A text is read as UTF-8; {file} is not, at byte {error.start}. "
                "Convert it, or leave it out with `data.pattern`."
            ) from None
    if not texts:
        raise DataError(f"No file in {path} matches `data.pattern` {recipe.pattern}.")
    return texts


def _files(path: Path, pattern: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        return sorted(path.glob(pattern))
    except (ValueError, NotImplementedError):
        raise DataError(
            f"`data.pattern` is of names below `data.path`, such as `*.txt` or "
            f"`**/*.py`; received `{pattern}`."
        ) from None
