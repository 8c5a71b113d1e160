"""Where a loop is, so that another process can go on with it."""

from typing import Any

import torch

from samestep.data.stream import Bookmark, bookmark_of_json, json_of_bookmark
from samestep.errors import OwnCodeError
from samestep.user_code import seeding


class Position:
    """The next step of a loop, which belongs to the recipe that it was begun with."""

    def __init__(self, **recipe: int | str) -> None:
        """Begin with the first step. `recipe` must be the same to go on."""
        self._recipe = recipe
        self.epoch, self.step = 0, 0
        """The next one, counted from 0; the step is within the epoch."""
        self.steps = 0
        """Those taken in all epochs."""
        self.is_within_step = False
        """Whether a step has begun whose gradients are not summed yet."""
        self._bookmark: Bookmark | None = None
        self._is_loaded = False

    def start_of(self, epoch: int) -> tuple[int, Bookmark | None]:
        """Return with which step to begin an epoch: once, with one that was loaded.

        And where its data go on, if they are a stream that has said so.
        """
        is_loaded, self._is_loaded = self._is_loaded, False
        if is_loaded and self.epoch == epoch:
            return self.step, self._bookmark
        return 0, None

    def reach(self, epoch: int, step: int, bookmark: Bookmark | None = None) -> None:
        """Note which step is next, and where a stream was before it."""
        self.epoch, self.step, self._bookmark = epoch, step, bookmark

    def begin_step(self) -> None:
        """Note that the next step has begun."""
        self.is_within_step = True

    def end_step(self) -> None:
        """Note that its gradients are summed, and the step after it is next."""
        self.step += 1
        self.steps += 1
        self.is_within_step = False

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the generators as they are between two steps.

        Raises OwnCodeError within a step.
        """
        if self.is_within_step:
            raise OwnCodeError(
                "A loop is saved between two steps, since all micro-batches of a step "
                f"belong together; step {self.step} of epoch {self.epoch} is not over. "
                "Call `state_dict` after `optimizer.step()`."
            )
        return {
            "recipe": self._recipe,
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.steps,
            "bookmark": json_of_bookmark(self._bookmark),
            "generator": torch.get_rng_state(),
            "generators": seeding.other_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position, with the generators of then. Raises OwnCodeError."""
        for name, value in self._recipe.items():
            if state["recipe"].get(name) != value:
                raise OwnCodeError(
                    f"A loop goes on with the `{name}` that it was begun with, "
                    f"{state['recipe'].get(name)}; received {value}."
                )
        self._bookmark = bookmark_of_json(state.get("bookmark"))
        self.epoch, self.step = state["epoch"], state["step"]
        self.steps = state.get("steps", 0)
        self.is_within_step, self._is_loaded = False, True
        torch.set_rng_state(state["generator"])
        seeding.set_other_states(state["generators"])
