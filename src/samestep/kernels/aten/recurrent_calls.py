"""Record recurrent layers whole: `nn.LSTM`, `nn.GRU`, `nn.RNN`.

PyTorch computes them by one operation of a library or by dozens for every step, as the
processor and its version decide. A function mode sees the call before, and records one
operation for each layer and direction, `samestep.lstm`, and one for its gradient.

The arguments of `samestep.lstm` are inputs, first state, first cell, weights and biases
of inputs and of states, and (batch_first, reversed); its results the states, the last
cell, and what is kept. `samestep.lstm_backward` takes what is kept, the gradients of
states and last cell or None, and numbers of arguments, whose gradients it returns.
GRUs and plain layers have no cell: None is passed, and the last cell means nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from samestep.kernels.trace import Recorder


KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class RecurrentCalls(TorchFunctionMode):
    """Replaces calls of `torch.lstm` and the like by operations of a recording."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if (name := _kind(func)) is None:
            return func(*args, **(kwargs or {}))
        if overload := _without_kernel(args):
            return self._recorder.record_call(
                f"aten.{name}.{overload}", args, lambda: func(*args)
            )
        return _layers(self._recorder, name, *args)


class LayerByLayer(TorchFunctionMode):
    """Has PyTorch compute each layer alone, with dropout between as in a recording.

    PyTorch draws its own masks with the steps first, also for `batch_first` inputs.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _kind(func) is None or _without_kernel(args):
            return func(*args, **(kwargs or {}))
        return _each_layer(func, *args)


def _kind(func: Any) -> str | None:
    """Return which of `KINDS` a function of torch is."""
    name = getattr(func, "__name__", "")
    return name if name in KINDS and func is getattr(torch, name) else None


def _each_layer(
    func: Any,
    inputs: Tensor,
    states: Tensor | Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    *rest: bool,
) -> tuple[Tensor, ...]:
    """Compute what `func` does, a layer in each call; the arguments are its own."""
    every = [states] if isinstance(states, Tensor) else states
    parts = [state.chunk(num_layers) for state in every]
    size, ends = len(parameters) // num_layers, list[Any]()
    for layer in range(num_layers):
        own = tuple(part[layer] for part in parts)
        first = own[0] if isinstance(states, Tensor) else own
        of_layer = parameters[size * layer :][:size]
        inputs, *last = func(inputs, first, of_layer, has_biases, 1, 0.0, train, *rest)
        ends.append(last)
        if train and dropout and layer + 1 < num_layers:
            inputs = functional.dropout(inputs, dropout)
    return (inputs, *(torch.cat(end) for end in zip(*ends, strict=True)))


def _without_kernel(args: tuple[Any, ...]) -> str:
    """Return the overload without a kernel, of what is packed or projected, or ""."""
    if not isinstance(args[3], bool):
        return "data"
    states = args[1]
    is_plain = isinstance(states, Tensor) or states[0].shape == states[1].shape
    return "" if is_plain else "input"


def _layers(
    recorder: Recorder,
    name: str,
    inputs: Tensor,
    states: Tensor | Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Record all layers, with dropout between them; the arguments are `torch.lstm`'s.

    Return the states of the last one, and the last state and cell of each.
    """
    firsts = [states, None] if isinstance(states, Tensor) else list(states)
    directions, size = 1 + bidirectional, 4 if has_biases else 2
    lasts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer in range(num_layers):
        results = []
        for direction in range(directions):
            number = layer * directions + direction
            own = [*parameters[size * number :][:size], None, None][:4]
            first = [None if every is None else every[number] for every in firsts]
            call = _Call(recorder, name, batch_first, direction == 1)
            result, cell = _Layer.apply(call, inputs, *first, *own)[:2]  # type: ignore[no-untyped-call]
            results.append(result)
            lasts[0].append(result.select(int(batch_first), direction - 1))
            lasts[1].append(cell)
        inputs = results[0] if len(results) == 1 else torch.cat(results, -1)
        if train and dropout and layer + 1 < num_layers:
            inputs = functional.dropout(inputs, dropout)
    ends = lasts if name == "lstm" else lasts[:1]
    return (inputs, *(_stacked(end) for end in ends))


def _stacked(states: list[Tensor]) -> Tensor:
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)


class _Call:
    """A call of one layer and direction, on its way through autograd."""

    def __init__(
        self, recorder: Recorder, name: str, batch_first: bool, reverse: bool
    ) -> None:
        self.recorder, self.name = recorder, name
        self.batch_first, self.reverse = batch_first, reverse
        self.kept: Any = None
        """The recording's value of what the backward pass needs."""


class _Layer(Function):
    """One layer in one direction; its numbers are zeros, as only shapes matter."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs, state = tensors[:2]
        assert inputs is not None
        assert state is not None
        shape = (*inputs.shape[:2], state.shape[-1])
        ctx.set_materialize_grads(False)
        ctx.call, ctx.like = call, tensors
        results = call.recorder.record_call(
            f"samestep.{call.name}",
            [*tensors, (call.batch_first, call.reverse)],
            lambda: (
                inputs.new_zeros(shape),
                torch.zeros_like(state),
                state.new_empty(0),
            ),
        )
        call.kept = call.recorder.value_of(results[2])
        ctx.mark_non_differentiable(results[2])
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call, like = ctx.call, ctx.like
        wanted = [n for n in range(len(like)) if ctx.needs_input_grad[n + 1]]
        results = call.recorder.record_call(
            f"samestep.{call.name}_backward",
            [call.kept, *gradients[:2], wanted],
            lambda: tuple(torch.zeros_like(like[n]) for n in wanted),
        )
        found = dict(zip(wanted, results, strict=True))
        return (None, *(found.get(n) for n in range(len(like))))
