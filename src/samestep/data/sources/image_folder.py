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
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from samestep.config.data import ImageData
from samestep.data.sources.source import ArraySource, Pair
from samestep.errors import DataError
from samestep.files import cache
from samestep.system.json_values import JsonObject


if TYPE_CHECKING:
    from types import ModuleType


LENGTH_BYTES = 8
MOST_NAMES = 5
LIBRARY = (
    "A folder of images is read by Pillow, which is not installed: "
    "`pip install 'samestep[data]'`."
)


@dataclass(frozen=True)
class Folder:
    """The images of one split."""

    path: Path
    classes: list[str]
    files: list[tuple[str, int]]
    """Paths below it, and the numbers of their classes."""


@dataclass(frozen=True)
class ImageSource(ArraySource):
    """See `Source`."""

    recipe: ImageData
    may_be_slow = True  # the images may be larger than the memory

    def prepare(self) -> str | None:
        """Decode what is not in the cache. Returns a notice. Raises DataError."""
        notices = []
        for folder in _folders(self.recipe).values():
            fill = _decoding(self.recipe, folder)
            notices.append(cache.prepare(_key(self.recipe, folder), fill))
            if skipped := _decoded(self.recipe, folder)[0]["skipped"]:
                notices.append(
                    f"{len(skipped)} of {len(folder.files)} images in {folder.path} "
                    f"are left out: {_listed(skipped)}"
                )
        return "; ".join(filter(None, notices)) or None

    def describe(self) -> JsonObject:
        """Return names, sizes, checksums, and what was left out. Raises DataError."""
        folders = _folders(self.recipe)
        splits, skipped = {}, 0
        for split, folder in folders.items():
            summary, _ = _decoded(self.recipe, folder)
            skipped += len(summary["skipped"])
            splits[split] = {
                "path": str(folder.path),
                "images": len(summary["labels"]),
                "bytes": summary["bytes"],
                "sha256": summary["sha256"],
                "skipped": summary["skipped"],
            }
        return {
            "source": "images",
            "classes": folders["train"].classes,
            "splits": splits,
            "pillow": _pillow().__version__,
            "skipped": skipped,
        }

    def arrays(self) -> Mapping[str, Pair]:
        """Map images uint8 [n, channels, size, size] and labels int64 [n].

        Raises DataError.
        """
        size, pairs = self.recipe.size, {}
        for split, folder in _folders(self.recipe).items():
            summary, content = _decoded(self.recipe, folder)
            labels = np.array(summary["labels"], np.int64)
            images = content.reshape(len(labels), self.recipe.channels, size, size)
            pairs[split] = Pair(images, labels, str(folder.path))
        return pairs


def _pillow() -> "ModuleType":
    """Import Pillow. Raises DataError if it is not installed."""
    try:
        import PIL
    except ImportError:
        raise DataError(LIBRARY) from None
    return PIL


def _folders(recipe: ImageData) -> dict[str, Folder]:
    train = _folder(Path(recipe.path))
    if recipe.test_path is None:
        return {"train": train}
    test = _folder(Path(recipe.test_path))
    if test.classes != train.classes:
        extra = sorted(set(test.classes) ^ set(train.classes))
        raise DataError(
            f"Both folders have one folder for each class; {train.path} and "
            f"{test.path} do not agree on {', '.join(extra[:MOST_NAMES])}."
        )
    return {"train": train, "test": test}


def _folder(path: Path) -> Folder:
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
    return Folder(path, [folder.name for folder in folders], named)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _key(recipe: ImageData, folder: Folder) -> str:
    how = (recipe.size, recipe.channels, recipe.skip_bad, _pillow().__version__)
    digest = hashlib.sha256(repr((how, folder.classes)).encode())
    for name, _ in folder.files:
        stat = (folder.path / name).stat()
        digest.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
    return f"images-{digest.hexdigest()[:24]}"


def _decoded(recipe: ImageData, folder: Folder) -> tuple[JsonObject, cache.Bytes]:
    """Return what the JSON says, and the bytes of all images."""
    content = cache.read(_key(recipe, folder), _decoding(recipe, folder))
    length = int.from_bytes(content[-LENGTH_BYTES:].tobytes(), "little")
    end = len(content) - LENGTH_BYTES - length
    return json.loads(content[end:-LENGTH_BYTES].tobytes()), content[:end]


def _decoding(recipe: ImageData, folder: Folder) -> cache.Fill:
    def fill(sink: BinaryIO) -> None:
        text = json.dumps(_decode(recipe, folder, sink)).encode()
        sink.write(text + len(text).to_bytes(LENGTH_BYTES, "little"))

    return fill


def _decode(recipe: ImageData, folder: Folder, sink: BinaryIO) -> JsonObject:
    """Write the pixels; return what the JSON says of the files. Raises DataError."""
    digest, size, labels = hashlib.sha256(), 0, list[int]()
    skipped: list[tuple[str, str]] = []
    for name, number in folder.files:
        try:
            content = (folder.path / name).read_bytes()
            pixels = _pixels(content, recipe)
        except Exception as error:
            # Damaged files make Pillow raise almost anything, SyntaxError too.
            skipped.append((name, f"{type(error).__name__}: {error}"))
            continue
        sink.write(pixels)
        for part in (os.fsencode(name), content):
            digest.update(len(part).to_bytes(8, "little") + part)
        labels.append(number)
        size += len(content)
    _check(recipe, folder, skipped, labels)
    return {
        "labels": labels,
        "skipped": skipped,
        "bytes": size,
        "sha256": digest.hexdigest(),
    }


def _check(
    recipe: ImageData, folder: Folder, skipped: list[tuple[str, str]], labels: list[int]
) -> None:
    if skipped and not recipe.skip_bad:
        raise DataError(
            f"Every file in a folder of images must be one; {len(skipped)} of "
            f"{len(folder.files)} in {folder.path} cannot be read: {_listed(skipped)}. "
            "Remove them, or go on without them: `--skip-bad`."
        )
    for empty in sorted(set(range(len(folder.classes))) - set(labels)):
        raise DataError(
            f"Every class has images; none in {folder.path / folder.classes[empty]} "
            "can be read."
        )


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
