"""What a checkpoint of Transformers lacks to go on exactly."""

from pathlib import Path
from typing import Any

import torch

from samestep.loop.position import Position


FILE = "samestep.pt"


def save(directory: str, position: Position, trainer: Any) -> None:
    """Write the position, and what the next entry of the log is made of."""
    logged = {"loss": float(trainer._tr_loss), "step": trainer._globalstep_last_logged}
    state = position.state_dict() | {"logged": logged | trainer.last_step}
    torch.save(state, Path(directory) / FILE)


def load(directory: str, position: Position) -> dict[str, Any] | None:
    """Set the position, and return what was logged; None for a plain checkpoint.

    Raises OwnCodeError if it is of another recipe.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    position.load_state_dict(state)
    logged: dict[str, Any] = state["logged"]
    return logged


def go_on_logging(trainer: Any, logged: dict[str, Any]) -> None:
    """Let the next entry be over all steps since the last one.

    The loss of the whole `train` stays that of its own steps.
    """
    trainer._tr_loss += logged["loss"]
    trainer._total_loss_scalar -= logged["loss"]
    trainer._globalstep_last_logged = logged["step"]
    trainer.last_step = {name: logged.get(name) for name in trainer.last_step}
