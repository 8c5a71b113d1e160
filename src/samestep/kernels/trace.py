"""Record the ATen operations of a module's forward and backward pass.

A dispatch mode sees every operation below autograd, those of the backward pass
included. (`torch.fx` would do, too, but its import costs 0.9 s.) The module computes a
small batch, so that operations have real shapes.
"""

import random
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
)


TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__).parent)


@dataclass(eq=False)
class Value:
    """A tensor of the recording."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = ""
    """The name of a parameter or buffer; `inputs`, or `gradient` for the outputs'."""
    data: Tensor | None = None
    """What it always is, if it depends neither on inputs nor on what is trained."""


@dataclass(frozen=True)
class Node:
    """One operation."""

    op: str
    """For example `aten.addmm.default`."""
    arguments: list[Any]
    """Values, numbers, and lists of them; last, a dict of options with a meaning."""
    outputs: list[Value]
    where: str
    """The module and the line of code that called it, for messages."""
    is_constant: bool = False
    """Whether it depends neither on inputs nor on what is trained."""


class Kind(NamedTuple):
    """What a sample has: the shape and the type of one of its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Inputs:
    """What a module takes: the tensors of a sample, and how it is called with them."""

    kinds: tuple[Kind, ...]
    call: Callable[[nn.Module, list[Tensor]], Any] = lambda module, given: module(
        *given
    )


@dataclass(frozen=True)
class OwnLoss:
    """A loss of the user's own, which is recorded with the module."""

    measure: Callable[[Any, Tensor], Sequence[Any]]
    """Returns the loss of outputs and targets, and what else is summed: tensors [], or
    numbers."""
    targets: Kind


@dataclass
class Trace:
    """The operations of a module's passes, in order."""

    samples: int
    """The size of the batch."""
    nodes: list[Node] = field(default_factory=list)
    num_forward: int = 0
    """How many of them belong to the forward pass, with a loss of the user's own."""
    inputs: list[Value] = field(default_factory=list)
    targets: Value | None = None
    """Those of a loss of the user's own."""
    outputs: Value | None = None
    measured: list[Any] = field(default_factory=list)
    """What a loss of the user's own returns: values, or numbers."""
    gradients: dict[str, Value] = field(default_factory=dict)
    """The gradients of the trained parameters, by name."""
    has_other_draws: bool = False
    """Whether Python's or NumPy's generator was asked for numbers."""


def record(
    module: nn.Module,
    samples: int,
    inputs: Inputs,
    backward: bool,
    whole: Callable[["Recorder"], AbstractContextManager[Any]],
    constant: Container[str] = (),
    own: OwnLoss | None = None,
) -> Trace:
    """Record the passes of a module that takes a batch of such inputs.

    `constant` are the names of parameters and buffers that training does not change.

    Its modes are as they are; its parameters and buffers are unchanged afterwards.
    With `backward` also the pass from the gradient of its outputs, or of its loss, to
    its parameters. `whole` gives the context in which calls are recorded as one
    operation each.
    """
    kinds = [*inputs.kinds, *([own.targets] if own else [])]
    trace = Trace(samples)
    tensors = [torch.zeros(samples, *k.shape, dtype=k.dtype) for k in kinds]
    saved = {name: buffer.clone() for name, buffer in module.named_buffers()}
    recorder = Recorder(trace)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        recorder.add(tensor, name, tensor if name in constant else None)
    trace.inputs = [recorder.add(tensor, "inputs") for tensor in tensors]
    trace.targets = trace.inputs.pop() if own else None
    before = _other_generators()
    try:
        with (
            torch.set_grad_enabled(backward),
            _names(module, recorder),
            _every_operation(),
            whole(recorder),
            recorder,
        ):
            outputs = inputs.call(module, tensors[: len(inputs.kinds)])
            end = outputs
            if own is not None:
                end = _record_loss(own, outputs, tensors[-1], recorder)
        trace.num_forward = len(trace.nodes)
        if own is None:
            trace.outputs = recorder.value_of(outputs)
        if backward:
            _record_backward(module, end, recorder)
    finally:
        with torch.no_grad():  # a buffer may have a gradient
            for name, buffer in module.named_buffers():
                buffer.copy_(saved[name])
    trace.has_other_draws = _other_generators() != before
    return trace


def _record_loss(
    own: OwnLoss, outputs: Any, targets: Tensor, recorder: "Recorder"
) -> Tensor:
    """Record a loss of the user's own, and return it."""
    recorder.what = "the loss"
    measured = own.measure(outputs, targets)
    recorder.trace.measured = [
        recorder.value_of(part) if isinstance(part, Tensor) else part
        for part in measured
    ]
    loss: Tensor = measured[0]
    return loss


def _other_generators() -> tuple[Any, ...]:
    """Return the states of generators whose draws are no operations."""
    _, words, *rest = np.random.get_state()
    return random.getstate(), np.asarray(words).tobytes(), *rest


def is_recording() -> bool:
    """Return whether a module is being recorded, as `torch.compiler.is_compiling`."""
    return isinstance(_get_current_dispatch_mode(), Recorder)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends every operation to a trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # a tensor's id is its own only while it lives
        self.active: list[str] = []
        """The modules that are being called, the innermost last."""
        self._sharing: dict[int, dict[int, Tensor]] = {}
        """The tensors that share a memory, by their ids."""
        self._places: dict[int, str] = {}
        """Where nodes of autograd's graph were made, by their sequence numbers."""
        self._is_paused = False
        self.what = "the model"
        """What is called outside of modules, for messages."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import torch._dynamo, 0.9 s

    def add(self, tensor: Tensor, name: str = "", data: Tensor | None = None) -> Value:
        """Return the value that stands for a tensor from now on."""
        value = Value(tuple(tensor.shape), tensor.dtype, name, data)
        self._alive.append(tensor)
        self._values[id(tensor)] = value
        self._sharing.setdefault(_memory(tensor), {})[id(tensor)] = tensor
        return value

    def value_of(self, tensor: Tensor) -> Value:
        """Return the value of a tensor.

        One that was not seen before is a constant, unless it shares its memory.
        """
        if id(tensor) in self._values:
            return self._values[id(tensor)]
        is_constant = _memory(tensor) not in self._sharing
        return self.add(tensor, data=tensor if is_constant else None)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._is_paused:
            return func(*args, **(kwargs or {}))
        arguments = [self._described(a) for a in args]
        given = {k: v for k, v in (kwargs or {}).items() if not _is_usual(k, v)}
        options = {k: self._described(v) for k, v in given.items()}
        if options:
            arguments.append(options)
        is_constant = torch.Tag.nondeterministic_seeded not in func.tags and all(
            value.data is not None for value in values_of(arguments)
        )
        is_in_place = func._schema.name.endswith("_") and isinstance(args[0], Tensor)
        if is_in_place:
            self._outdate(args[0], is_constant)
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        outputs = [
            self.add(tensor, data=tensor if is_constant else None)
            for tensor in results
            if isinstance(tensor, Tensor)
        ]
        node = Node(str(func), arguments, outputs, self._where(), is_constant)
        self.trace.nodes.append(node)
        return result

    def record_call(
        self,
        op: str,
        arguments: Sequence[Any],
        compute: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """Record what `compute` does as one operation, and return its results."""
        described = [self._described(a) for a in arguments]
        self._is_paused = True
        try:
            results = compute()
        finally:
            self._is_paused = False
        outputs = [self.add(tensor) for tensor in results]
        self.trace.nodes.append(Node(op, described, outputs, self._where()))
        return results

    def _outdate(self, tensor: Tensor, stays_constant: bool) -> None:
        """Forget what is known of a tensor, and of its views, since it will change."""
        for key, view in self._sharing.get(_memory(tensor), {}).items():
            value = self._values[key]
            data = view if stays_constant and value.data is not None else None
            if value.data is not None and not value.name:
                value.data = value.data.clone()
            self._values[key] = Value(value.shape, value.dtype, data=data)

    def _described(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.value_of(argument)
        if isinstance(argument, list | tuple):
            return [self._described(a) for a in argument]
        return argument

    def _where(self) -> str:
        if (node := torch._C._current_autograd_node()) is not None:
            place = self._places.get(node._sequence_nr())
            return f"gradient of {place}" if place else "in the backward pass"
        frame = sys._getframe(2)
        while frame.f_back and frame.f_code.co_filename.startswith((TORCH, HERE)):
            frame = frame.f_back
        is_own = not frame.f_code.co_filename.startswith((TORCH, HERE))
        line = f", {frame.f_code.co_filename}:{frame.f_lineno}" if is_own else ""
        module = next((name for name in reversed(self.active) if name), "")
        place = (f"module `{module}`" if module else self.what) + line
        # The node of the operation was made just before.
        self._places[torch._C._autograd._get_sequence_nr() - 1] = place
        return place


def _memory(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor; 0 for one that has none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


def values_of(arguments: Iterable[Any]) -> Iterator[Value]:
    """Yield the values among arguments, and in lists of them."""
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, list):
            yield from values_of(argument)
        elif isinstance(argument, dict):
            yield from values_of(argument.values())


def _is_usual(option: str, value: Any) -> bool:
    """Return whether an option says nothing: where a tensor lies, or the default."""
    if option in ("layout", "device", "pin_memory", "memory_format", "non_blocking"):
        return True
    return value is None or (option == "dtype" and value == torch.float32)


class _Begin(Function):
    """The place of the loss: gives the outputs a recorded gradient."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient  # in a list, or autograd would make another tensor
        return outputs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient[0], None


def _record_backward(module: nn.Module, outputs: Tensor, recorder: Recorder) -> None:
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    gradient = torch.ones_like(outputs)
    recorder.add(gradient, "gradient")
    loss: Tensor = _Begin.apply(outputs, [gradient])  # type: ignore[no-untyped-call]
    parameters = list(trained.values())
    with recorder:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    recorder.trace.gradients = {
        name: recorder.value_of(gradient)
        for name, gradient in zip(trained, gradients, strict=True)
        if gradient is not None
    }


@contextmanager
def _every_operation() -> Iterator[None]:
    """Keep transformers from leaving out, in evaluation, what a mask hides."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _names(module: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which module is being called."""
    names = {id(part): name for name, part in module.named_modules()}

    def enter(part: nn.Module, _: Any) -> None:
        recorder.active.append(names.get(id(part), ""))

    def leave(*_: Any) -> None:
        recorder.active.pop()

    handles = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
