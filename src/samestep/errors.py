"""Every exception of samestep.

SamestepError                      exit code 1
├── ExportError
├── UsageError (a ValueError)      exit code 2: nothing was started
│   ├── RecipeError
│   ├── PlacementError
│   ├── RunError
│   ├── CheckpointError
│   ├── DataError
│   ├── KernelError
│   └── OwnCodeError
└── TrainingError
    ├── WorkerFailed
    ├── WorkerWrong
    ├── NonFiniteLoss
    ├── NonFiniteGradient
    ├── ReplicasDiffer
    ├── NotReproducible
    ├── PeerLost
    ├── WorkerLate
    └── OutputError

Interrupted (not an Exception)     exit code 129, 130, 143 or 75
OldNameWarning (a FutureWarning)

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
    """For an error of a worker: its `rank`, its `traceback`, and the path of its `log`
    or, if that was temporary, the log's `output`. If a worker was wrong, in all workers
    `wrong`, the message that says so."""


class UsageError(SamestepError, ValueError):
    """The request cannot be carried out as it stands."""

    exit_code: ClassVar[int] = 2


class RecipeError(UsageError):
    """A recipe is unknown, unreadable, or has an impossible value."""


class PlacementError(UsageError):
    """The requested workers, exchange or output directory are not possible."""


class RunError(UsageError):
    """A run directory is missing, is not a run, is unfinished, or exists already."""


class CheckpointError(UsageError):
    """A checkpoint is damaged, or was written under other conditions."""


class DataError(UsageError):
    """A data file is missing, unreadable or damaged."""


class KernelError(UsageError):
    """The kernels of portable arithmetic are missing, or cannot run here."""


class OwnCodeError(UsageError):
    """The user's model, data or loss function does not follow its contract."""


class NotPortable(UsageError):
    """A model has operations, or a machine a processor, without portable kernels."""


class TrainingError(SamestepError):
    """A training started and could not be finished."""


class WorkerFailed(TrainingError):
    """A worker died, or raised an exception of user code or of a library."""


class WorkerWrong(TrainingError):
    """A worker computed other gradients than a second one, which was right."""


class NonFiniteLoss(TrainingError):
    """The loss of a micro-batch is NaN or infinite."""


class NonFiniteGradient(TrainingError):
    """A gradient does not fit into the 16 bits of the recipe's `compression`."""


class ReplicasDiffer(TrainingError):
    """Workers that must hold the same weights do not."""


class NotReproducible(TrainingError):
    """User code gives another result for the same micro-batch the second time."""


class PeerLost(TrainingError):
    """Another worker disappeared during an exchange."""


class WorkerLate(TrainingError):
    """A worker made no progress in time."""

    @classmethod
    def naming(
        cls, who: str, rule: str, seconds: float, option: str, cause: str = "stuck"
    ) -> "WorkerLate":
        """Return the error that names who is late, and the option to raise.

        The rule says what must happen within `seconds`.
        """
        return cls(
            f"{rule} within {round(seconds, 1):g} s; late: {who}. It is stopped, "
            f"{cause} or very slow; if it is only slow, increase {option}."
        )


class OutputError(TrainingError):
    """A file of the run could not be written."""


class ExportError(SamestepError):
    """A model cannot be written in a format, or predicts differently when read back."""


class OldNameWarning(FutureWarning):
    """A field or option was given by its old name, which the next release drops."""


def warn_old_name(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is now called `new`; by default at the caller's caller."""
    text = f"`{old}` is now `{new}`; the old name goes with the next release."
    warnings.warn(text, OldNameWarning, stacklevel=stacklevel)


class Interrupted(BaseException):
    """A signal ended the training.

    Like KeyboardInterrupt it is not an Exception, so that `except Exception` lets it
    pass.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        """Keep the message and the exit code for a process that ends by the signal."""
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
"""Names in other libraries, or in earlier versions -> the name here."""


def did_you_mean(word: str, known: Iterable[str], section: str = "") -> str:
    """Return `" Did you mean `x`?"` for the nearest known word, or the empty string.

    With a `section`, the known words are its fields.
    """
    words = list(known)
    near = [SYNONYMS[word]] if SYNONYMS.get(word) in words else []
    near += difflib.get_close_matches(word, words, n=1)
    if not near:
        return ""
    return f" Did you mean `{f'{section}.' if section else ''}{near[0]}`?"
