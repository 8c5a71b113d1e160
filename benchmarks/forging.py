"""Forges runs, as somebody who knows their format: all digests are right again.

A library of faults.py and of tests.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from samestep import Recipe, Run
from samestep.output import ledger
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint


CLOSING = {
    ledger.FILE: "ledger_sha256",
    ledger.MICRO_BATCHES: "micro_batch_ledger_sha256",
}
"""The fields of result.json that close the ledgers."""


def records(run: Path) -> ledger.Records:
    """Return the records of a ledger."""
    return ledger.parse((run / ledger.FILE).read_bytes()).records


def kept(run: Path) -> list[int]:
    """Return the steps of the checkpoints."""
    return checkpoint.steps(checkpoint.directory_of(run))


def load(run: Path, step: int) -> Checkpoint:
    """Return a checkpoint."""
    return checkpoint.load(checkpoint.path_of(checkpoint.directory_of(run), step))


def rewrite_checkpoint(
    run: Path,
    step: int,
    recipe: Recipe | None = None,
    manifest: dict[str, Any] | None = None,
    **vectors: Any,
) -> None:
    """Write a checkpoint with other vectors, recipe, or fields of the manifest."""
    old = load(run, step)
    changed = old.manifest.model_copy(update=manifest or {})
    checkpoint.write(
        checkpoint.directory_of(run),
        replace(old.state, **vectors),
        changed.layout,
        recipe or Recipe.from_dict(changed.recipe),
        changed.build,
        changed.epochs,
    )


def rewrite_model(run: Path) -> None:
    """Write the final weights as the last checkpoint has them."""
    last = load(run, kept(run)[-1])
    layout, recipe = last.manifest.layout, Recipe.from_dict(last.manifest.recipe)
    result = checkpoint.result_of(last.state, layout)
    content = checkpoint.model_bytes(result, layout, recipe)
    (run / "model.safetensors").write_bytes(content)


def rewrite_ledger(
    run: Path,
    change: Callable[[ledger.Records], None] = lambda _: None,
    recipe: Recipe | None = None,
    name: str = ledger.FILE,
) -> None:
    """Change the records of a ledger, or its recipe, and close the chain again."""
    recipe, file = recipe or Run.open(run).recipe, run / name
    columns = ledger.columns(recipe.micro_batches)[name]
    content = ledger.header_of(recipe.digest, columns)
    head = ledger.head_of(content)
    for chunk in ledger.parse(file.read_bytes(), columns).chunks:
        change(chunk)
        written = ledger.chunk_of(chunk, head)
        content, head = content + written, written[-ledger.DIGEST :]
    file.write_bytes(content)
    rewrite_result(run, **{CLOSING[name]: head.hex()}, recipe=recipe.to_dict())


def rewrite_result(run: Path, **fields: Any) -> None:
    """Change fields of result.json."""
    file = run / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
