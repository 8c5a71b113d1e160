"""A trial of the user's optimizer before the training, on a copy of the parameters.

It finds out what the optimizer keeps between two steps, and checks what a training
relies on: that another optimizer goes on from what was kept, and, if the recipe says
that the update is elementwise, that its slices have the bits of the whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samestep.core.plan import derive_seed
from samestep.errors import NotReproducible, OwnCodeError
from samestep.optim.building import Definition
from samestep.optim.custom import CustomOptimizer
from samestep.optim.kept_state import vector_names
from samestep.state.flat import Flat
from samestep.system.json_values import JsonObject
from samestep.user_code.references import capital


STEPS = 4
"""Steps of the trial; after half of them the optimizer is made anew."""
WORKERS = (2, 3)
"""The numbers of workers among which an elementwise update is divided."""


def run(made: Definition, flat: Flat) -> Definition:
    """Return the definition with what the optimizer keeps, and its layout.

    `flat` has the model's parameters, which stay unchanged. Raises OwnCodeError, and
    NotReproducible if an optimizer made anew does not go on with the same bits.
    """
    start = torch.zeros(flat.size, dtype=flat.dtype, device=flat.device)
    for view, parameter in zip(flat.views(start), flat.parameters, strict=True):
        view.copy_(parameter.data)
    gradients = list(_gradients(made, flat))
    first = CustomOptimizer(made, start.clone(), (0, flat.size))
    first.step(gradients[0], made.recipe.lr)
    kinds = first.kinds()
    names = vector_names(kinds, made.layout, made.who)
    layout = made.layout.model_copy(update={"states": names})
    made = replace(made, kinds=kinds, layout=layout)
    trial = _Trial(made, start, gradients)
    whole = trial.go_on(trial.begin(0, flat.size), (0, STEPS))
    half = trial.go_on(trial.begin(0, flat.size), (0, STEPS // 2))
    if not trial.go_on(half.restored(made, start.clone()), (STEPS // 2, STEPS)).equals(
        whole
    ):
        raise NotReproducible(
            "An optimizer that is made anew goes on from the saved state with the same "
            f"bits; {made.who} does not. What it keeps between two steps belongs in "
            "`self.state`, by parameter, and numbers in its param groups: not in other "
            "attributes, a generator of its own, or other modules."
        )
    if layout.division == "aligned":
        _check_slices(trial, whole)
    return made


def _gradients(made: Definition, flat: Flat) -> Iterator[Tensor]:
    """Yield the gradient [size] of each step; it is zero between parameters."""
    for step in range(STEPS):
        generator = torch.Generator()
        generator.manual_seed(derive_seed(made.seed, "optimizer", "trial", step))
        vector = torch.zeros(flat.size, dtype=flat.dtype)
        for view in flat.views(vector):
            view.normal_(generator=generator)
        yield vector.to(flat.device)


@dataclass
class _Training:
    """A slice of the parameters, and the optimizer that updates it."""

    optimizer: CustomOptimizer
    parameters: Tensor
    """[size]; only the slice is updated."""
    owned: tuple[int, int]
    states: Tensor
    """[vectors, n]"""
    steps: int = 0
    numbers: JsonObject | None = None

    def save(self) -> None:
        """Copy the optimizer's state to `states` and `numbers`."""
        self.numbers = self.optimizer.save()

    def restored(self, made: Definition, parameters: Tensor) -> "_Training":
        """Return the same with another optimizer, which takes over the saved state.

        It is made with the `parameters` that a training begins with.
        """
        optimizer = CustomOptimizer(made, parameters, self.owned, [*self.states])
        parameters.copy_(self.parameters)
        optimizer.resume((), self.steps)
        optimizer.restore(self.numbers or {})
        return replace(self, optimizer=optimizer, parameters=parameters)

    def equals(self, whole: "_Training") -> bool:
        """Return whether the slice has the bits that it has in `whole`."""
        part = slice(*self.owned)
        own = self.parameters[part], *self.states
        other = whole.parameters[part], *(state[part] for state in whole.states)
        pairs = zip(own, other, strict=True)
        return self.numbers == whole.numbers and all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs
        )


@dataclass(frozen=True)
class _Trial:
    made: Definition
    start: Tensor
    gradients: list[Tensor]

    def begin(self, first: int, end: int) -> _Training:
        """Begin to train a slice of the parameters."""
        vectors = len(self.made.layout.states), end - first
        states = torch.zeros(vectors, dtype=self.start.dtype, device=self.start.device)
        parameters, owned = self.start.clone(), (first, end)
        optimizer = CustomOptimizer(self.made, parameters, owned, [*states])
        return _Training(optimizer, parameters, owned, states)

    def go_on(self, training: _Training, steps: tuple[int, int]) -> _Training:
        """Take the steps `[first, end)`, and save."""
        for gradient in self.gradients[slice(*steps)]:
            part = gradient[slice(*training.owned)].clone()
            training.optimizer.step(part, self.made.recipe.lr)
        training.steps = steps[1]
        training.save()
        return training


def _check_slices(trial: _Trial, whole: _Training) -> None:
    """Raise OwnCodeError if slices do not have the bits of the whole."""
    for workers in WORKERS:
        for first, end in trial.made.layout.slices(workers):
            part = trial.go_on(trial.begin(first, end), (0, STEPS))
            if not part.equals(whole):
                raise OwnCodeError(
                    f"{capital(trial.made.who)} is declared elementwise, and a part of "
                    "its update has other bits than the same part of a whole update: "
                    "it uses the shape of a parameter, sums or norms, or random "
                    "numbers. Leave out `optimizer.elementwise`."
                )
