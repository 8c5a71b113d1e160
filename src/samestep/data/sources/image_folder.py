"""A folder of images by class, decoded once and mapped by every worker.

The supervisor reads every file with Pillow, in the order of paths, into unsigned bytes
[n, channels, size, size] in the cache. After them stand JSON about the files, and the
length of that in eight bytes. The name of the cached file has a hash of the paths,
sizes and times of modification, so that a change is noticed without reading the images
again.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from samestep.config.data import ImageData
from samestep.data.sources.source import ArraySource, Pair, library
from samestep.errors import DataError
from samestep.files import cache
from samestep.system.json_values import JsonObject


LENGTH_BYTES = 8
MOST_NAMES = 5


@dataclass(frozen=True)
class Folder:
    """The images of one split."""

    recipe: ImageData
    path: Path
    classes: list[str]
    files: list[tuple[str, int]]
    """Paths below it, and the numbers of their classes."""

    @property
    def key(self) -> str:
        """The name of the cached file. Raises DataError without Pillow."""
        recipe = self.recipe
        how = (recipe.size, recipe.channels, recipe.skip_bad, _version())
        digest = hashlib.sha256(repr((how, self.classes)).encode())
        for name, _ in self.files:
            stat = (self.path / name).stat()
            digest.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
        return f"images-{digest.hexdigest()[:24]}"

    def decoded(self) -> tuple[JsonObject, cache.Bytes]:
        """Return what the JSON says, and the bytes of all images. Raises DataError."""
        content = cache.read(self.key, self.decode)
        length = int.from_bytes(content[-LENGTH_BYTES:].tobytes(), "little")
        end = len(content) - LENGTH_BYTES - length
        return json.loads(content[end:-LENGTH_BYTES].tobytes()), content[:end]

    def decode(self, sink: BinaryIO) -> None:
        """Write the file for the cache. Raises DataError."""
        digest, size, labels = hashlib.sha256(), 0, list[int]()
        skipped: list[tuple[str, str]] = []
        for name, number in self.files:
            try:
                content = (self.path / name).read_bytes()
                pixels = _pixels(content, self.recipe)
            except Exception as error:
                # Damaged files make Pillow raise almost anything, SyntaxError too.
                skipped.append((name, f"{type(error).__name__}: {error}"))
                continue
            sink.write(pixels)
            for part in (os.fsencode(name), content):
                digest.update(len(part).to_bytes(8, "little") + part)
            labels.append(number)
            size += len(content)
        self._check(skipped, labels)
        summary = {
            "labels": labels,
            "bytes": size,
            "sha256": digest.hexdigest(),
            "skipped": skipped,
        }
        text = json.dumps(summary).encode()
        sink.write(text + len(text).to_bytes(LENGTH_BYTES, "little"))

    def _check(self, skipped: list[tuple[str, str]], labels: list[int]) -> None:
        if skipped and not self.recipe.skip_bad:
            raise DataError(
                f"Every file in a folder of images must be one; {len(skipped)} of "
                f"{len(self.files)} in {self.path} cannot be read: {_listed(skipped)}. "
                "Remove them, or go on without them: `--skip-bad`."
            )
        for empty in sorted(set(range(len(self.classes))) - set(labels)):
            raise DataError(
                f"Every class has images; none in {self.path / self.classes[empty]} "
                "can be read."
            )


@dataclass(frozen=True)
class ImageSource(ArraySource):
    recipe: ImageData
    may_be_slow = True  # the images may be larger than the memory

    def prepare(self) -> str | None:
        """Decode what is not in the cache. Returns a notice. Raises DataError."""
        notices = []
        for folder in _folders(self.recipe).values():
            notices.append(cache.prepare(folder.key, folder.decode))
            if skipped := folder.decoded()[0]["skipped"]:
                notices.append(
                    f"{len(skipped)} of {len(folder.files)} images in {folder.path} "
                    f"are left out: {_listed(skipped)}"
                )
        return "; ".join(filter(None, notices)) or None

    def describe(self) -> JsonObject:
        """Return names, sizes, checksums, and what was left out. Raises DataError."""
        folders = _folders(self.recipe)
        splits = {}
        for split, folder in folders.items():
            summary, _ = folder.decoded()
            labels = summary.pop("labels")
            splits[split] = {"path": str(folder.path), "images": len(labels), **summary}
        return {
            "source": "images",
            "classes": folders["train"].classes,
            "splits": splits,
            "pillow": _version(),
            "skipped": sum(len(split["skipped"]) for split in splits.values()),
        }

    def arrays(self) -> Mapping[str, Pair]:
        """Map images uint8 [n, channels, size, size] and labels int64 [n].

        Raises DataError.
        """
        size, pairs = self.recipe.size, {}
        for split, folder in _folders(self.recipe).items():
            summary, content = folder.decoded()
            labels = np.array(summary["labels"], np.int64)
            images = content.reshape(len(labels), self.recipe.channels, size, size)
            pairs[split] = Pair(images, labels, str(folder.path))
        return pairs


def _version() -> str:
    """Return the version of Pillow. Raises DataError if it is not installed."""
    version: str = library("PIL", "A folder of images is read by Pillow").__version__
    return version


def _folders(recipe: ImageData) -> dict[str, Folder]:
    train = _folder(recipe, Path(recipe.path))
    if recipe.test_path is None:
        return {"train": train}
    test = _folder(recipe, Path(recipe.test_path))
    if test.classes != train.classes:
        extra = sorted(set(test.classes) ^ set(train.classes))
        raise DataError(
            f"Both folders have one folder for each class; {train.path} and "
            f"{test.path} do not agree on {', '.join(extra[:MOST_NAMES])}."
        )
    return {"train": train, "test": test}


def _folder(recipe: ImageData, path: Path) -> Folder:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; it has one folder for each class.")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not _is_hidden(p))
    if len(folders) < 2:
        raise DataError(
            f"A folder of images has one folder for each class, at least 2; {path} has "
            f"{len(folders)}."
        )
    files = []
    for number, folder in enumerate(folders):
        images = [p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p)]
        if not images:
            raise DataError(
                f"Every class has images; the folder {folder} has none. Remove it, or "
                "fill it."
            )
        files += [(p, number) for p in sorted(images)]
    named = [(str(p.relative_to(path)), number) for p, number in files]
    return Folder(recipe, path, [folder.name for folder in folders], named)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _listed(skipped: list[Any]) -> str:
    names = [f"{name} ({why})" for name, why in skipped[:MOST_NAMES]]
    more = len(skipped) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _pixels(content: bytes, recipe: ImageData) -> bytes:
    """Return [channels, size, size]: upright, scaled, cropped to a square."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        mode = "L" if recipe.channels == 1 else "RGB"
        upright = ImageOps.exif_transpose(image).convert(mode)
        side = (recipe.size, recipe.size)
        fitted = ImageOps.fit(upright, side, Image.Resampling.BILINEAR)
    values = np.asarray(fitted, np.uint8).reshape(*side, recipe.channels)
    return np.ascontiguousarray(values.transpose(2, 0, 1)).tobytes()
