"""What a source of data does, for the supervisor and for the workers."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from samestep.system.json_values import JsonObject
from samestep.user_code.references import UserCode


if TYPE_CHECKING:  # these import torch, which supervisors do without
    from samestep.data.splits import Samples
    from samestep.data.targets import Labels


class Source(ABC):
    """The data of one recipe."""

    may_be_slow = False
    """Whether drawing samples may take longer than copying them in memory: workers then
    fork a process that can draw them ahead of time."""

    def prepare(self) -> str | None:
        """Fill the cache, in the supervisor, before any worker starts.

        Returns a notice for the user. Raises DataError.
        """
        return None

    @abstractmethod
    def describe(self) -> JsonObject:
        """Return name, sizes and checksums, for the run's record. Raises DataError."""

    @abstractmethod
    def load(self, user_code: UserCode, labels: "Labels") -> "Samples":
        """Return the splits and what they share, in a worker.

        Modules with torch are imported in here. Raises DataError, OwnCodeError.
        """
