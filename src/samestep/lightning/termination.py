"""The end of a training on SIGTERM: after the same step in every process.

Lightning asks rank 0 before each step, over Gloo, whether it was told to end, and each
process by itself after the step; so one may have ended where another still waits for
it. Here the processes that were told say so in what they add up in every step anyway.
"""

from typing import Any

from samestep.loop.loop import Loop


NAME = "sigterm"
"""Of what is added up."""


class Termination:
    """Knows whether this process was told to end, and whether any was."""

    def __init__(self, trainer: Any, loop: Loop) -> None:
        """Take the place of what Lightning does in its handler and before a step."""
        self._trainer, self._loop, self._was_told = trainer, loop, False
        trainer._signal_connector._sigterm_notifier_fn = self._note
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody

    def _note(self, number: int, _: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self._was_told:
            launcher.kill(number)
        self._was_told = True

    def tell(self) -> None:
        """In a micro-batch: tell all processes if this one was told to end."""
        if self._was_told and self._loop.samples:
            self._loop.add(**{NAME: 1.0})

    def agree(self, totals: dict[str, tuple[float, float]]) -> None:
        """All processes: let Lightning end the training if any was told to."""
        if totals.pop(NAME, None):
            self._trainer._signal_connector.received_sigterm = True


def _ask_nobody() -> None:
    """Do what Lightning does before a step where there is nothing to ask."""
