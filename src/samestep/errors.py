"""Every exception of samestep.

SamestepError                      exit code 1
├── ExportError
├── UsageError (a ValueError)      exit code 2: nothing was started
│   ├── RecipeError
│   ├── PlacementError
│   ├── RunError
│   ├── CheckpointError
│   ├── DataError
│   └── OwnCodeError
└── TrainingError
    ├── WorkerFailed
    ├── NonFiniteLoss
    ├── NonFiniteGradient
    ├── ReplicasDiffer
    ├── NotReproducible
    ├── PeerLost
    ├── WorkerLate
    └── OutputError

Interrupted (not an Exception)     exit code 129, 130, 143 or 75

A message is one or two sentences: the rule, the value received, the remedy.
"""

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class SamestepError(Exception):
    """Root of the tree: catch this to catch everything that samestep raises."""

    exit_code: ClassVar[int] = 1
    details: Mapping[str, Any] = {}
    """For an error of a worker: its `rank`, its `traceback` and its `log`, or `output`,
    what was in a log that is no longer there."""


class UsageError(SamestepError, ValueError):
    """The request cannot be carried out as it stands."""

    exit_code: ClassVar[int] = 2


class RecipeError(UsageError):
    """A recipe is unknown, unreadable, or has an impossible value."""


class PlacementError(UsageError):
    """The workers, the exchange or the output cannot be had as asked for."""


class RunError(UsageError):
    """A run directory is missing, foreign, unfinished, or already there."""


class CheckpointError(UsageError):
    """A checkpoint is damaged, or was made under other conditions."""


class DataError(UsageError):
    """A data file is missing, unreadable or damaged."""


class OwnCodeError(UsageError):
    """A model, data or loss function of the user's does not do what it must."""


class TrainingError(SamestepError):
    """Training started and could not be finished."""


class WorkerFailed(TrainingError):
    """A worker died, or raised an exception of the user's or of a library's."""


class NonFiniteLoss(TrainingError):
    """The loss of a micro-batch is NaN or infinite."""


class NonFiniteGradient(TrainingError):
    """A gradient does not fit into the 16 bits of the recipe's `compression`."""


class ReplicasDiffer(TrainingError):
    """Workers that must hold the same weights do not."""


class NotReproducible(TrainingError):
    """Own code computes otherwise when it computes the same micro-batch again."""


class PeerLost(TrainingError):
    """Another worker went away in the middle of an exchange."""


class WorkerLate(TrainingError):
    """A worker made no progress in time."""


class OutputError(TrainingError):
    """A file of the run could not be written."""


class ExportError(SamestepError):
    """A model has no form in another format, or predicts otherwise there."""


class OldNameWarning(FutureWarning):
    """A field or an option is given by a name that the next release will not know."""


def warn_old_name(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is now called `new`; by default at the caller's caller."""
    text = f"`{old}` is now `{new}`; the old name goes with the next release."
    warnings.warn(text, OldNameWarning, stacklevel=stacklevel)


class Interrupted(BaseException):
    """A signal ended the training; like KeyboardInterrupt, not to be swallowed."""

    def __init__(self, message: str, exit_code: int) -> None:
        """`exit_code` is that of a process which stops because of the signal."""
        super().__init__(message)
        self.exit_code = exit_code


SYNONYMS = {
    "batch_size": "global_batch",
    "dropout_rate": "dropout",
    "fresh": "reinit",
    "grad_clip": "max_grad_norm",
    "hidden_size": "hidden",
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "num_heads": "heads",
    "num_layers": "depth",
    "random_state": "seed",
}
"""How other libraries call what has a name here."""


def did_you_mean(word: str, known: Iterable[str], section: str = "") -> str:
    """`" Did you mean `x`?"` for the nearest known word, or the empty string.

    The known words are fields of `section`, if that is given.
    """
    words = list(known)
    near = [SYNONYMS[word]] if SYNONYMS.get(word) in words else []
    near += difflib.get_close_matches(word, words, n=1)
    return (
        f" Did you mean `{'.'.join(filter(None, (section, near[0])))}`?" if near else ""
    )
