"""What the update of a parameter needs to know of its step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step of one parameter group."""

    number: int
    """Counted from 1."""
    lr: float
    weight_decay: float
    share: float
    """The square of the learning rate by the sum of those of all steps so far."""
