"""Small data of every kind, written as files."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from samestep import Recipe


SIDE, CLASSES = 8, 3
NUM_TRAIN, NUM_TEST = 90, 20
Section = dict[str, Any]


def pictures(count: int, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """uint8 [count, 8, 8] with a bright row, which is the class, uint8 [count]."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % CLASSES
    images = random.integers(0, 120, (count, SIDE, SIDE), np.uint8)
    images[np.arange(count), 2 * labels + 1] += 100
    return images, labels


def idx_bytes(array: NDArray[Any]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def idx(folder: Path, packed: bool = False) -> Section:
    folder.mkdir()
    for prefix, count, seed in (("train", NUM_TRAIN, 0), ("t10k", NUM_TEST, 1)):
        images, labels = pictures(count, seed)
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            path, content = folder / f"{prefix}-{what}-ubyte", idx_bytes(array)
            if packed:
                path = path.with_name(f"{path.name}.gz")
                content = gzip.compress(content)
            path.write_bytes(content)
    return {"source": "idx", "path": str(folder)}


def fashion(folder: Path) -> Section:
    augment = {"flip": 0.5, "crop": 1, "mixup": 0.4}
    return idx(folder, packed=True) | {"source": "fashion-mnist", "augment": augment}


def npz(path: Path) -> Section:
    images, labels = pictures(NUM_TRAIN)
    np.savez(path, x_train=images, y_train=labels)
    return {"source": "npz", "path": f"{path}.npz", "test": 0.2}


def packed_npz(path: Path) -> Section:
    """RGB images with the channels last, floats; an own test."""
    arrays: dict[str, Any] = {}
    for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        images, labels = pictures(count)
        arrays[f"x_{split}"] = np.stack([images] * 3, axis=-1) / 255
        arrays[f"y_{split}"] = labels.astype(np.int32)
    np.savez_compressed(path, **arrays)
    augment = {"shift": 2, "mixup": 1.0}
    section = {"path": f"{path}.npz", "channels_last": True, "augment": augment}
    return {"source": "npz"} | section


def npy(path: Path) -> Section:
    """A regression on big-endian numbers."""
    images, labels = pictures(NUM_TRAIN)
    np.save(f"{path}-x.npy", images.reshape(NUM_TRAIN, -1).astype(">f8") / 255)
    np.save(f"{path}-y.npy", np.stack([labels, -labels], axis=1) / 2)
    files = {"inputs": f"{path}-x.npy", "targets": f"{path}-y.npy"}
    return {"source": "npy"} | files


def images(folder: Path, count: int = 60) -> Section:
    """Write images of several sizes and modes, in folders named for their class."""
    for number, (pixels, label) in enumerate(zip(*pictures(count), strict=True)):
        (folder / f"row-{label}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels).resize((9 + number % 3, 9))
        mode = ("L", "RGB", "1")[number % 3]
        image.convert(mode).save(folder / f"row-{label}" / f"{number:03}.png")
    return {"source": "images", "path": str(folder), "size": SIDE}


def columns(count: int = NUM_TRAIN) -> dict[str, list[Any]]:
    """Numbers, words, true and false; the name of the class is a word."""
    random = np.random.default_rng(0)
    width, sort = random.normal(5, 2, count), random.integers(3, size=count)
    return {
        "id": [f"sample {i}" for i in range(count)],
        "width": width.tolist(),
        "count": random.integers(9, size=count).tolist(),
        "colour": [("red", "green", "blue")[s] for s in sort],
        "is_old": (random.random(count) < 0.5).tolist(),
        "kind": [
            ("ant", "bee", "cat")[int(w > 5) + int(s > 1)]
            for w, s in zip(width, sort, strict=True)
        ],
    }


def csv_file(path: Path, table: dict[str, list[Any]] | None = None) -> Section:
    pyarrow.csv.write_csv(pa.table(table or columns()), f"{path}.csv")
    section = {"path": f"{path}.csv", "target": "kind", "ignore": ["id"]}
    return {"source": "table"} | section


def parquet_file(path: Path) -> Section:
    """A regression, with missing values, and a table for the test."""
    table = columns()
    table["width"][3] = table["colour"][5] = None
    table["target"] = [c / 3 for c in table["count"]]
    pyarrow.parquet.write_table(pa.table(table), f"{path}.parquet")
    files = {"path": f"{path}.parquet", "test_path": f"{path}.parquet"}
    how = {"target": "target", "ignore": ["id"], "missing": "mean"}
    return {"source": "table"} | files | how


SOURCES: dict[str, Callable[[Path], Section]] = {
    "idx": idx,
    "fashion": fashion,
    "npz": npz,
    "packed-npz": packed_npz,
    "npy": npy,
    "images": images,
    "csv": csv_file,
    "parquet": parquet_file,
}


def recipe_of(data: Section, **fields: Any) -> Recipe:
    """A short training on it, with the loss that suits it."""
    regression = data["source"] == "npy" or data.get("target") == "target"
    loss = "squared-error" if regression else "cross-entropy"
    plain = {
        "name": "small",
        "epochs": 2,
        "global_batch": 24,
        "micro_batches": 6,
        "evaluation_batch": 7,
        "data": data,
        "model": {"family": "mlp", "hidden": [9]},
        "loss": {"name": loss},
        "optimizer": {"name": "adam", "lr": 0.01},
    }
    return Recipe.from_dict(plain).changed(fields)
