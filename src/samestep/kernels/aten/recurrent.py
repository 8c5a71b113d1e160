"""Recurrent layers, which `recurrent_calls` records whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from samestep.kernels.aten.linear import is_vector, linear, linear_by_k, summed
from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import NO_FLAGS, NONE, PANEL, Op, room
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Parameter,
    SampleSum,
    WeightGradient,
    Zeros,
)


@dataclass(frozen=True)
class Cell:
    """A kind of recurrent layer."""

    forward: OpKind
    backward: OpKind
    gates: int
    """How many times `hidden` rows its weights have."""
    flags: OpFlag = NO_FLAGS


CELLS = {
    "lstm": Cell(OpKind.LSTM, OpKind.LSTM_GRAD, 4),
    "gru": Cell(OpKind.GRU, OpKind.GRU_GRAD, 3),
    "rnn_tanh": Cell(OpKind.RNN, OpKind.RNN_GRAD, 1),
    "rnn_relu": Cell(OpKind.RNN, OpKind.RNN_GRAD, 1, OpFlag.RELU),
}


@dataclass(frozen=True)
class Kept:
    """What a layer keeps for its backward pass."""

    cell: Cell
    inputs: Activation
    gates: Activation
    """[b, steps, gates * hidden], or [steps, b, ...]; becomes its gradient."""
    states: Activation
    """[b, steps + 1, hidden], that before the first step included."""
    history: Activation | None
    """LSTM: cells, then their tanh; GRU: products with the states."""
    weights: tuple[Parameter, Parameter]
    """The weights of the inputs, and those of the states."""
    time: int
    """The dimension of the steps."""
    flags: OpFlag
    has_state: bool
    """Whether there is a state before the first step."""

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.gates.shape[self.time]

    @property
    def hidden(self) -> int:
        """The number of units."""
        return self.states.shape[-1]


def _forward(cell: Cell) -> Callable[[Lowering, Node, list[Any]], Results]:
    """Return what lowers the forward pass of a layer."""

    def lowered(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
        match arguments:
            case [
                Activation() as x,
                (Activation() | Zeros()) as state,
                (Activation() | Zeros() | None) as first_cell,
                Parameter() as of_inputs,
                Parameter() as of_states,
                (Parameter() | None) as bias,
                (Parameter() | None) as state_bias,
                [bool(batch_first), bool(reverse)],
            ]:
                time = int(batch_first)
                if x.samples_dim != 1 - time or not (
                    is_vector(of_inputs) and is_vector(of_states)
                ):
                    return None
                place = NONE if bias is None else lowering.place(bias)
                gates = linear(lowering, x, of_inputs.transpose(0, 1), place)
                states, history = _rooms(lowering, node, cell, time)
                flags = cell.flags | (OpFlag.REVERSED if reverse else NO_FLAGS)
                kept = Kept(
                    *(cell, x, gates, states, history, (of_inputs, of_states)),
                    *(time, flags, isinstance(state, Activation)),
                )
                _append(lowering, kept, state_bias, [state, first_cell])
                return _results(kept)
        return None

    return lowered


def _rooms(
    lowering: Lowering, node: Node, cell: Cell, time: int
) -> tuple[Activation, Activation | None]:
    """Return room for the states of all steps, and for what else is kept."""
    shape = list(node.outputs[0].shape)
    steps, hidden = shape[time], shape[-1]

    def of(count: int, width: int) -> Activation:
        return lowering.activation([*shape[:time], count, *shape[time + 1 : 2], width])

    history = None
    if cell.gates == 4:
        history = of(2 * steps + 1, hidden)
    elif cell.gates == 3:
        history = of(steps, 3 * hidden)
    return of(steps + 1, hidden), history


def _append(
    lowering: Lowering,
    kept: Kept,
    bias: Parameter | None,
    firsts: list[Activation | Zeros | None],
) -> None:
    """Append the steps of the forward pass, from the first state and cell."""
    cell, rows = kept.cell, kept.gates.shape[-1]
    size = room(rows, kept.hidden) + rows * PANEL
    i = [kept.gates.buffer, kept.states.buffer, _buffer(kept.history)]
    i += [lowering.room(size), kept.steps, kept.hidden]
    i += [lowering.place(kept.weights[1])]
    i += [NONE if bias is None else lowering.place(bias)]
    for first in firsts if cell.gates == 4 else [firsts[0], None]:
        given = lowering.whole(first) if isinstance(first, Activation) else None
        i.append(_buffer(given))
    lowering.ops.append(Op(cell.forward, i, flags=kept.flags))


def _buffer(activation: Activation | None) -> int:
    return NONE if activation is None else activation.buffer


def _results(kept: Kept) -> Results:
    """Return the states of all steps, the last cell, and what is kept."""
    is_back = bool(kept.flags & OpFlag.REVERSED)
    first = 0 if is_back else 1
    states = kept.states.slice(kept.time, first, first + kept.steps)
    last: Any = Zeros()
    if kept.cell.gates == 4 and kept.history is not None:
        last = kept.history.select(kept.time, 0 if is_back else kept.steps)
    return [states, last, kept]


def _backward(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [
            Kept() as kept,
            (Activation() | None) as dy,
            (Activation() | None) as dc,
            [*wanted],
        ]:
            firsts = _append_backward(
                lowering, kept, dy, dc, 1 in wanted or 2 in wanted
            )
            gradients = kept.gates, kept.gates
            if kept.cell.gates == 3:
                assert kept.history is not None
                gradients = kept.gates, kept.history
            sums = [summed(lowering, gradients[0], [0, 1])] * 2 if 5 in wanted else []
            if 6 in wanted and gradients[1] is not gradients[0]:
                sums[1] = summed(lowering, gradients[1], [0, 1])
            return [
                _gradient(lowering, kept, gradients, sums, n, firsts) for n in wanted
            ]
    return None


def _append_backward(
    lowering: Lowering,
    kept: Kept,
    dy: Activation | None,
    dc: Activation | None,
    is_wanted: bool,
) -> list[Activation]:
    """Append the steps of the backward pass.

    Return the gradients of the first state and cell, if they are wanted.
    """
    cell, rows, hidden = kept.cell, kept.gates.shape[-1], kept.hidden
    flags, firsts = kept.flags, list[Activation]()
    if dc is not None or is_wanted:
        state = list(kept.states.shape)
        del state[kept.time]
        firsts = [lowering.activation(state) for _ in range(2)]
    if dc is not None:
        flags |= OpFlag.LAST_STATE
        lowering.fill(firsts[0], 0.0)
        lowering.copy(dc, firsts[1])
    size = room(hidden, rows) + 2 * hidden * PANEL
    i = [NONE if dy is None else lowering.whole(dy).buffer, kept.gates.buffer]
    i += [kept.states.buffer, _buffer(kept.history), lowering.room(size)]
    i += [kept.steps, hidden, lowering.place(kept.weights[1]), NONE]
    i += [first.buffer for first in firsts] or [NONE, NONE]
    lowering.ops.append(Op(cell.backward, i, flags=flags))
    return firsts


def _gradient(
    lowering: Lowering,
    kept: Kept,
    gradients: tuple[Activation, Activation],
    sums: Sequence[Activation | SampleSum],
    number: int,
    firsts: list[Activation],
) -> Any:
    """Return the gradient of an argument of the forward pass, by its number.

    `gradients` are those of the products with the inputs and with the states, `sums`
    those of their biases.
    """
    match number:
        case 0:
            return linear_by_k(lowering, gradients[0], kept.weights[0])
        case 1 | 2:
            return firsts[number - 1]
        case 3:
            return WeightGradient(gradients[0], kept.inputs)
        case 4:
            return _weight_gradient(kept, gradients[1])
    return sums[number - 5]


def _weight_gradient(kept: Kept, gradient: Activation) -> WeightGradient:
    """Return the gradient of the states' weight; states that are zero are left out."""
    time, steps = kept.time, kept.steps
    is_back = bool(kept.flags & OpFlag.REVERSED)
    first, last = (0, steps - 1) if is_back else (1, steps)
    states = kept.states.slice(time, 1, steps)
    if kept.has_state or steps == 1:
        first, last = 0, steps
        states = kept.states.slice(time, int(is_back), steps + is_back)
    part = gradient.slice(time, first, last)
    assert part is not None
    assert states is not None
    return WeightGradient(part, states)


LOWERINGS: Lowerings = {
    **{f"samestep.{name}": _forward(cell) for name, cell in CELLS.items()},
    **{f"samestep.{name}_backward": _backward for name in CELLS},
}
