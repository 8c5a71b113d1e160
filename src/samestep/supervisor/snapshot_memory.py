"""The snapshots of one generation of workers, under a supervisor or under torchrun."""

from collections.abc import Callable
from dataclasses import dataclass

from samestep.errors import CheckpointError
from samestep.messages.training import Message, SnapshotSaved, Started
from samestep.state import frozen
from samestep.state.layout import Layout
from samestep.state.snapshot import Snapshots, State


OnSnapshot = Callable[[Callable[[], State | None], Layout, SnapshotSaved], None]
"""Called with (read, layout, saved) for each snapshot; `read` returns None too late."""


@dataclass
class SnapshotMemory:
    """The shared memory into which the workers of one generation save.

    The layout of the memory is known once the workers have started, or from the state
    that they continue from.
    """

    snapshots: int
    """Descriptor of the memory of the snapshots."""
    constants: int
    """Descriptor of the memory of what the training does not change."""
    workers: int
    layout: Layout | None
    """The layout of the state to continue from; later that of the workers."""
    _memory: Snapshots | None = None

    @property
    def newest(self) -> State | None:
        """The newest snapshot that all workers have saved."""
        return self._memory.newest() if self._memory else None

    def fill(self, state: State) -> None:
        """Write the state from which the workers continue."""
        assert self.layout is not None
        constants = state.constants
        self._memory = Snapshots(self.snapshots, self.layout, self.workers, constants)
        self._memory.fill(state)

    def receive(self, message: Message, offer: OnSnapshot) -> None:
        """Follow a message of the workers: their start, or a snapshot to offer.

        Raises CheckpointError if the model is not the one that was saved.
        """
        match message:
            case Started():
                self._start(Layout.model_validate(message.layout))
            case SnapshotSaved(slot=slot, step=step) as saved:
                memory, layout = self._memory, self.layout
                assert memory is not None
                assert layout is not None
                offer(lambda: of_step(memory.read(slot), step), layout, saved)

    def _start(self, layout: Layout) -> None:
        if self.layout is not None:
            check_same(self.layout, layout)
        self.layout = layout
        constants = frozen.read(self.constants)
        self._memory = Snapshots(self.snapshots, layout, self.workers, constants)


def check_same(before: Layout, after: Layout) -> None:
    """Raise CheckpointError if the model is not the one that was saved."""
    for name in Layout.model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            raise CheckpointError(
                "A training continues with the model that it was saved with, and this "
                f"one has other {name.replace('_', ' ')}: {_brief(old)} then, "
                f"{_brief(new)} now. A function that builds a model must always build "
                "the same one."
            )


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def of_step(state: State | None, step: int) -> State | None:
    """Return the state if it is still that of `step`: slots are written again."""
    return state if state and state.step == step else None
