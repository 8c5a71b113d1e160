"""Which checkpoints were written to their end: a process may be killed meanwhile."""

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from samestep.errors import OwnCodeError


def begin(directory: str, step: int) -> None:
    """Let the checkpoint of a step be incomplete, also if it is written over one."""
    folder = Path(directory) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)


def chosen(given: str | bool, directory: str) -> str:
    """Return the checkpoint that is given, or the last complete one of a directory.

    Raises OwnCodeError if it is not complete, or there is none.
    """
    if isinstance(given, str):
        candidates = [Path(given)]
    else:
        candidates = _latest_first(Path(directory))
    for candidate in candidates:
        if _is_complete(candidate):
            return str(candidate)
    received = ", ".join(map(str, candidates)) or f"none in {directory}"
    raise OwnCodeError(
        f"A training goes on from a checkpoint that is complete; received {received}. "
        "Name an older one, or leave out `resume_from_checkpoint`."
    )


def _latest_first(directory: Path) -> list[Path]:
    steps = {
        int(step): path
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.rpartition("-")[2]).isdigit()
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def _is_complete(checkpoint: Path) -> bool:
    """Whether what Transformers writes last is there, up to its last brace."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
