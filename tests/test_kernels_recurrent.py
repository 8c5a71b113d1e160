"""Recurrent layers: beside a plain C reference, bit for bit, and beside float64."""

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_calls import (
    Made,
    Sample,
    check_bits,
    compile_reference,
    operation,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence

from samestep import NotPortable
from samestep.core import tree
from samestep.kernels.execution import Execution
from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.program import Program, room
from samestep.kernels.values import (
    LossOp,
)
from samestep.portable.passes import places_of
from samestep.state.flat import Flat


GATES = {OpKind.LSTM: 4, OpKind.GRU: 3, OpKind.RNN: 1}
GRADIENTS = {
    OpKind.LSTM: OpKind.LSTM_GRAD,
    OpKind.GRU: OpKind.GRU_GRAD,
    OpKind.RNN: OpKind.RNN_GRAD,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    directory = tmp_path_factory.mktemp("reference")
    return compile_reference(directory, "reference_recurrent.c")


def make(
    kind: OpKind,
    is_gradient: bool,
    sample: Sample,
    steps: int,
    hidden: int,
    choice: int,
) -> Made:
    """Return a call: with and without bias, first states, both directions."""
    gates = GATES[kind]
    rows = gates * hidden
    sample.floats("parameters", rows * hidden + rows + 3)
    kept = {4: (2 * steps + 1) * hidden, 3: steps * rows, 1: 0}[gates]
    features = [steps * rows, (steps + 1) * hidden, kept]
    buffers = [sample.by_feature(n) if n else -1 for n in features]
    states = [sample.by_feature(hidden), sample.by_feature(hidden)]
    features += [hidden, hidden]
    first = [states[0], states[1] if gates != 1 else -1] if choice % 2 else [-1, -1]
    if gates == 3 and not is_gradient:
        first[1] = -1
    known = {b: n for b, n in zip([*buffers, *states], features, strict=True) if b >= 0}
    flags = OpFlag.REVERSED if choice // 2 % 2 else OpFlag(0)
    flags |= OpFlag.RELU if gates == 1 and choice // 4 % 2 else OpFlag(0)
    if not is_gradient:
        work = sample.workspace(room(rows, hidden) + rows * 32)
        bias = 3 + rows * hidden if choice // 4 % 2 else -1
        i = [*buffers, work, steps, hidden, 3, bias, *first]
        return sample, operation(kind, i, flags=flags), known
    only = (-1, choice % steps)[choice // 8 % 2]
    dy = sample.by_feature(hidden * (steps if only < 0 else 1))
    known[dy] = hidden * (steps if only < 0 else 1)
    if choice == 5:
        dy, only = -1, -1
    flags |= OpFlag.LAST_STATE if choice // 4 % 2 else OpFlag(0)
    work = sample.workspace(room(hidden, rows) + 2 * hidden * 32)
    i = [dy, *buffers, work, steps, hidden, 3, only, *first]
    return sample, operation(GRADIENTS[kind], i, flags=flags), known


@pytest.mark.parametrize("is_gradient", [False, True])
@pytest.mark.parametrize("kind", GATES)
@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    steps=st.integers(1, 5),
    hidden=st.integers(1, 30) | st.just(90),
    choice=st.integers(0, 15),
    misalignment=st.integers(0, 15),
    specials=st.sampled_from([0.0, 0.0, 0.02]),
    seed=st.integers(0, 2**32),
)
def test_all_steps_give_the_bits_of_the_reference(
    reference: ctypes.CDLL,
    kind: OpKind,
    is_gradient: bool,
    sizes: list[int],
    steps: int,
    hidden: int,
    choice: int,
    misalignment: int,
    specials: float,
    seed: int,
) -> None:
    """With every instruction set; 90 units have more terms than a block of a sum."""

    def made() -> Made:
        sample = Sample(sizes, 0, 0, seed, misalignment, specials)
        return make(kind, is_gradient, sample, steps, hidden, choice)

    check_bits(reference.recurrent_run, made)


class Reader(nn.Module):
    """Reads steps [b, steps, features] and answers with what is left in the end."""

    def __init__(self, layer: nn.RNNBase, use: str, has_state: bool = False) -> None:
        super().__init__()
        self.layer, self.use = layer, use
        self.begin = None
        if has_state:
            self.begin = nn.Linear(layer.input_size, layer.hidden_size)
        width = layer.proj_size or layer.hidden_size
        self.head = nn.Linear(width * (1 + layer.bidirectional), 3)

    def forward(self, inputs: Tensor) -> Tensor:
        first = None if self.begin is None else self._first(self.begin(inputs[:, 0]))
        steps = inputs if self.layer.batch_first else inputs.transpose(0, 1)
        states, last = self.layer(steps, first)
        if self.use == "all":
            end = states.mean(1 if self.layer.batch_first else 0)
        elif self.use == "step":
            end = states[:, -1]
        elif isinstance(last, tuple):
            end = last[0][-1] + last[1][-1]
        else:
            end = last[-1]
        answers: Tensor = self.head(end)
        return answers

    def _first(self, state: Tensor) -> Any:
        count = self.layer.num_layers * (1 + self.layer.bidirectional)
        states = torch.stack([state] * count) if count > 1 else state.unsqueeze(0)
        return (states, states * 2.0) if self.layer.mode == "LSTM" else states


READERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Reader(nn.LSTM(5, 6, batch_first=True), "step"),
    "lstm, both directions": lambda: Reader(
        nn.LSTM(5, 6, 2, bidirectional=True), "all", has_state=True
    ),
    "lstm, last cell": lambda: Reader(nn.LSTM(5, 6, 2), "last", has_state=True),
    "lstm without biases": lambda: Reader(nn.LSTM(5, 6, bias=False), "last"),
    "gru": lambda: Reader(nn.GRU(5, 6, 2, batch_first=True), "step", has_state=True),
    "gru, both directions": lambda: Reader(nn.GRU(5, 6, bidirectional=True), "all"),
    "gru of one unit": lambda: Reader(nn.GRU(5, 1), "last", has_state=True),
    "tanh": lambda: Reader(nn.RNN(5, 6, 2), "all", has_state=True),
    "relu": lambda: Reader(
        nn.RNN(5, 6, nonlinearity="relu", bidirectional=True), "all"
    ),
}


def program_of(model: nn.Module, flat: Flat, steps: int = 4) -> Program:
    return lower(model, (steps, 5), places_of(flat), LossOp(OpKind.CROSS_ENTROPY))


@pytest.mark.parametrize("name", READERS)
def test_gradients_are_those_of_float64(name: str) -> None:
    torch.manual_seed(1)
    model = READERS[name]()
    exact = copy.deepcopy(model).double()
    sizes = [7, 40]
    inputs, labels = torch.randn(47, 4, 5), torch.randint(3, (47,))
    flat = Flat(model)
    vector, slot = torch.zeros(flat.size), torch.zeros(flat.size + flat.tail)
    flat.bind(vector, write=True)
    execution = Execution(program_of(model, flat), load_kernels(), 47, 2)
    merges = torch.tensor([tree.num_merges(m, (0, 2), 2) for m in range(2)])
    execution.bind_micro_batches(torch.tensor([0, *sizes]).cumsum(0), merges)
    execution.bind_slots([slot], flat.size)
    execution.bind(parameters=vector, running=flat.saved_buffers())
    execution.bind(inputs=inputs.flatten(1).contiguous())
    execution.labels[:47] = labels.numpy()
    execution.call.weight = 1 / 47
    execution.run()
    loss = functional.cross_entropy(exact(inputs.double()), labels)
    found = flat.views(slot)
    for x, y in zip(
        found, torch.autograd.grad(loss, list(exact.parameters())), strict=True
    ):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


def test_dropout_between_layers_is_that_of_the_counters() -> None:
    model = Reader(nn.LSTM(5, 6, 3, dropout=0.5, batch_first=True), "step")
    program = program_of(model, Flat(model))
    assert [op.kind.name for op in program.ops].count("ACTIVATE") == 4
    assert program.has_draws


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        states: Tensor = self.layer(pack_sequence(list(inputs)))[1][0][-1]
        return states


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_packed_sequences_and_projections_are_refused_by_name() -> None:
    models = (
        (Packed(), "number of samples in `aten.unbind.int`"),
        (
            Reader(nn.LSTM(5, 4, proj_size=3), "all"),
            r"aten\.lstm\.input.*one length",
        ),
    )
    for model, message in models:
        with pytest.raises(NotPortable, match=message):
            program_of(model, Flat(model))
