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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samestep.config.data import ImageData
from samestep.data.sources.npy import Pair
from samestep.errors import DataError
from samestep.system import cache


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


def load(recipe: ImageData) -> dict[str, Pair]:
    """`train`, and `test` if it is there. Raises DataError."""
    found = {}
    for split, folder in _folders(recipe).items():
        about, content = _decoded(recipe, folder)
        shape = (len(about["labels"]), recipe.channels, recipe.size, recipe.size)
        labels = np.array(about["labels"], np.int64)
        found[split] = Pair(content.reshape(shape), labels, str(folder.path))
    return found


def prepare(recipe: ImageData) -> str | None:
    """Decodes what is not in the cache. Returns a notice. Raises DataError."""
    notices = []
    for folder in _folders(recipe).values():
        fill = _decoding(recipe, folder)
        notices.append(cache.prepare(_key(recipe, folder), fill))
        if skipped := _decoded(recipe, folder)[0]["skipped"]:
            count = f"{len(skipped)} of {len(folder.files)} images"
            notices.append(f"{count} in {folder.path} are left out: {_named(skipped)}")
    return "; ".join(filter(None, notices)) or None


def describe(recipe: ImageData) -> dict[str, Any]:
    """Names, sizes, checksums, and what was left out."""
    splits, skipped = {}, 0
    for split, folder in _folders(recipe).items():
        about, _ = _decoded(recipe, folder)
        skipped += len(about["skipped"])
        splits[split] = {
            "path": str(folder.path),
            "images": len(about["labels"]),
            "bytes": about["bytes"],
            "sha256": about["sha256"],
            "skipped": about["skipped"],
        }
    classes = _folders(recipe)["train"].classes
    return {
        "source": "images",
        "classes": classes,
        "splits": splits,
        "pillow": _pillow().__version__,
        "skipped": skipped,
    }


def _pillow() -> "ModuleType":
    """Raises DataError."""
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


def _decoded(recipe: ImageData, folder: Folder) -> tuple[dict[str, Any], cache.Bytes]:
    """What the JSON says, and the bytes of all images."""
    content = cache.read(_key(recipe, folder), _decoding(recipe, folder))
    length = int.from_bytes(content[-LENGTH_BYTES:].tobytes(), "little")
    end = len(content) - LENGTH_BYTES - length
    return json.loads(content[end:-LENGTH_BYTES].tobytes()), content[:end]


def _decoding(recipe: ImageData, folder: Folder) -> cache.Fill:
    def fill(sink: cache.Sink) -> None:
        text = json.dumps(_decode(recipe, folder, sink)).encode()
        sink.write(text + len(text).to_bytes(LENGTH_BYTES, "little"))

    return fill


def _decode(recipe: ImageData, folder: Folder, sink: cache.Sink) -> dict[str, Any]:
    """Writes the pixels; returns what is known of the files. Raises DataError."""
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
    sha256 = digest.hexdigest()
    about = {"labels": labels, "skipped": skipped, "bytes": size}
    return {**about, "sha256": sha256}


def _check(
    recipe: ImageData, folder: Folder, skipped: list[tuple[str, str]], labels: list[int]
) -> None:
    if skipped and not recipe.skip_bad:
        raise DataError(
            f"Every file in a folder of images must be one; {len(skipped)} of "
            f"{len(folder.files)} in {folder.path} cannot be read: {_named(skipped)}. "
            "Remove them, or go on without them: `--skip-bad`."
        )
    for empty in sorted(set(range(len(folder.classes))) - set(labels)):
        raise DataError(
            f"Every class has images; none in {folder.path / folder.classes[empty]} "
            "can be read."
        )


def _named(skipped: list[Any]) -> str:
    names = [f"{name} ({why})" for name, why in skipped[:MOST_NAMES]]
    more = len(skipped) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _pixels(content: bytes, recipe: ImageData) -> bytes:
    """[channels, size, size], upright, scaled, without what overlaps."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        mode = "L" if recipe.channels == 1 else "RGB"
        upright = ImageOps.exif_transpose(image).convert(mode)
        side = (recipe.size, recipe.size)
        fitted = ImageOps.fit(upright, side, Image.Resampling.BILINEAR)
    values = np.asarray(fitted, np.uint8).reshape(*side, recipe.channels)
    return np.ascontiguousarray(values.transpose(2, 0, 1)).tobytes()
