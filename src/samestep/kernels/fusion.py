"""Join neighbouring operations of a program; no bit changes.

An operation that alone reads the result of another can often be part of it, which
saves a pass over memory.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from samestep.kernels.interface import Binary, OpFlag, OpKind, Unary
from samestep.kernels.lowering import (
    AXES,
)
from samestep.kernels.program import NONE, PANEL, Buffer, Op


HOSTS = {OpKind.LINEAR: 6, OpKind.BATCH_NORM: 11, OpKind.CONV: 17}
"""Operations that end with an activation, and where the stream of dropout stands."""
RELU_HOSTS = {*HOSTS, OpKind.MAX_POOL, OpKind.BATCH_NORM_2D}
"""Operations that end with a ReLU."""

PLAIN = {
    *(OpKind.UNARY, OpKind.BINARY, OpKind.SUM_ROWS, OpKind.MATMUL, OpKind.SOFTMAX),
    *(OpKind.DRAW, OpKind.COMBINE),
}
"""Operations that do nothing but write one buffer."""

K_BLOCK = 256
"""Terms of a block of a sum."""
LARGE = 4096
"""Rows of a convolution's result whose panels leave the second cache: 0.5 MB."""

GATES = {OpKind.LINEAR_GRAD_INPUT: 5, OpKind.CONV_GRAD_INPUT: 16}
"""Those that end with a gate, and where its buffer stands."""


def needed(ops: list[Op]) -> list[Op]:
    """Return the operations without those whose results nothing reads."""
    read = Counter(buffer for op in ops for buffer in set(op.reads))
    kept = []
    for op in reversed(ops):
        own = set(op.reads)
        is_read = any(read[buffer] > (buffer in own) for buffer in op.writes)
        if op.kind in PLAIN and not is_read:
            read.subtract(own)
        else:
            kept.append(op)
    return kept[::-1]


def fuse(ops: Iterable[Op], buffers: list[Buffer]) -> list[Op]:
    """Return the operations with activations and gates joined to what is before.

    Room that they need then is appended to the buffers.
    """
    graph = Graph(ops)
    for op in graph.ops:
        if op.kind == OpKind.BINARY and op.i[3] == Binary.ADD:
            _join_addition(graph, op)
    for op in graph.ops:
        if op.kind == OpKind.ACTIVATE and op.flags == OpFlag.RELU:
            _join_relu(graph, op)
    for op in graph.ops:
        if op.kind == OpKind.ACTIVATE and op.flags == OpFlag.DROPOUT:
            _join_dropout(graph, op)
    for op in graph.ops:
        if op.kind == OpKind.UNARY and op.i[2] == Unary.GELU:
            _keep_slope(graph, op)
    for op in graph.ops:
        if op.kind == OpKind.GATE and not _join_gate_behind(graph, op):
            _join_gate(graph, op)
    for op in graph.ops:
        if op.kind == OpKind.MAX_POOL_GRAD:
            _join_pool_grad(graph, op)
        elif op.kind == OpKind.MAX_POOL:
            _join_pool(graph, buffers, op)
    return graph.ops


class Graph:
    """Operations in their order, found by the buffers that they read and write."""

    def __init__(self, ops: Iterable[Op]) -> None:
        self._ops = dict(enumerate(ops))  # by place
        self._places = {id(op): place for place, op in self._ops.items()}
        self._read = defaultdict[int, set[int]](set)
        self._written = defaultdict[int, set[int]](set)
        self._used = dict[int, tuple[list[int], list[int]]]()
        for op in self._ops.values():
            self.update(op)

    @property
    def ops(self) -> list[Op]:
        """A new list of the operations."""
        return list(self._ops.values())

    def writer(self, buffer: int) -> Op:
        """Return the first operation that writes a buffer."""
        return self._ops[min(self._written[buffer])]

    def readers(self, buffer: int) -> list[Op]:
        """Return the operations that read a buffer."""
        return [self._ops[place] for place in sorted(self._read[buffer])]

    def update(self, op: Op) -> None:
        """Note the buffers of an operation that has changed."""
        place = self._places[id(op)]
        self._forget(place)
        self._used[place] = reads, writes = op.reads, op.writes
        for buffer in reads:
            self._read[buffer].add(place)
        for buffer in writes:
            self._written[buffer].add(place)

    def remove(self, op: Op) -> None:
        """Take an operation out."""
        place = self._places.pop(id(op))
        self._forget(place)
        del self._ops[place]

    def replace(self, old: Op, new: Op) -> None:
        """Put an operation that is not in the graph into the place of another."""
        place = self._places.pop(id(old))
        self._ops[place], self._places[id(new)] = new, place
        self.update(new)

    def _forget(self, place: int) -> None:
        reads, writes = self._used.pop(place, ([], []))
        for buffer in reads:
            self._read[buffer].discard(place)
        for buffer in writes:
            self._written[buffer].discard(place)


def _keep_slope(graph: Graph, gelu: Op) -> None:
    """Compute the derivative of GELU beside its value, for the backward pass.

    It takes the place of the inputs, which nothing else may need.
    """
    x, y, _, rows = gelu.i[:4]
    ones, zeros = [1] * (AXES - 1), [0] * (AXES - 1)
    whole = [x, y, Unary.GELU, rows, 0, rows, 0, *ones, rows, *(*zeros, 1) * 2]
    grads = [op for op in graph.readers(x) if op is not gelu]
    if gelu.i != whole or len(grads) != 1 or grads[0].kind != OpKind.BINARY:
        return
    (grad,) = grads
    is_grad = grad.i[3] == Binary.GELU_GRAD and grad.i[2] == x != grad.i[0]
    if is_grad and _is_row_by_row(grad, rows):
        gelu.i[2], grad.i[3] = Unary.GELU_SLOPE, Binary.MUL
        _join_slope(graph, grad)


def _join_slope(graph: Graph, product: Op) -> None:
    """Join the multiplication with a derivative to the product before it."""
    host = graph.writer(product.i[0])
    is_free = host.kind == OpKind.LINEAR_GRAD_INPUT and host.i[5] == NONE
    if is_free and len(graph.readers(product.i[0])) == 1:
        host.i[1], host.i[5] = product.i[1], product.i[2]
        host.flags |= OpFlag.SLOPE
        graph.remove(product)
        graph.update(host)


def _join_relu(graph: Graph, relu: Op) -> None:
    host = graph.writer(relu.i[0])
    is_free = host.kind in RELU_HOSTS and not host.flags & OpFlag.RELU
    if is_free and len(graph.readers(relu.i[0])) == 1:
        host.i[1] = relu.i[1]
        host.flags |= OpFlag.RELU
        graph.remove(relu)
        graph.update(host)


def _join_dropout(graph: Graph, dropout: Op) -> None:
    """Join dropout to the ReLU before it, and its gradient to that of the ReLU.

    What is left of an output that was dropped is zero, as if the ReLU had cut it off.
    """
    host = graph.writer(dropout.i[0])
    if (
        host.kind not in HOSTS
        or not host.flags & OpFlag.RELU
        or host.flags & OpFlag.DROPOUT
    ):
        return
    gates = [op for op in graph.readers(dropout.i[0]) if op is not dropout]
    stream = dropout.i[3]
    drops = [graph.writer(gate.i[0]) for gate in gates if gate.kind == OpKind.GATE]
    is_joined = len(drops) == len(gates) and all(
        drop.kind == OpKind.ACTIVATE
        and drop.flags == OpFlag.DROPOUT
        and drop.i[3] == stream
        and len(graph.readers(drop.i[1])) == 1
        for drop in drops
    )
    if not is_joined:
        return
    for gate, drop in zip(gates, drops, strict=True):
        gate.i[0], gate.i[2] = drop.i[0], dropout.i[1]
        gate.f[0] = 1 / (1 - dropout.f[0])
        graph.remove(drop)
        graph.update(gate)
    host.i[1], host.i[HOSTS[host.kind]] = dropout.i[1], stream
    host.f[-1] = dropout.f[0]
    host.flags |= OpFlag.DROPOUT
    graph.remove(dropout)
    graph.update(host)


def _join_gate(graph: Graph, gate: Op) -> None:
    """Join a gate to the product whose result it changes."""
    host = graph.writer(gate.i[0])
    place = GATES.get(host.kind)
    if place is None or host.i[place] != NONE:
        return
    if len(graph.readers(gate.i[0])) == 1:
        host.i[1], host.i[place], host.f[0] = gate.i[1], gate.i[2], gate.f[0]
        graph.remove(gate)
        graph.update(host)


def _join_addition(graph: Graph, add: Op) -> None:
    """Join the addition of whole activations to a norm of images before it."""
    first, second, rows = add.i[0], add.i[2], add.i[4]
    if second < 0 or not _is_row_by_row(add, rows):
        return
    for own, other in ((first, second), (second, first)):
        host = graph.writer(own)
        if (
            host.kind == OpKind.BATCH_NORM_2D
            and not host.flags & OpFlag.RELU
            and host.i[10] == NONE
            and graph.readers(own) == [add]
        ):
            graph.remove(host)  # it moves: the other may come after it
            host.i[1], host.i[10] = add.i[1], other
            graph.replace(add, host)
            return


def _is_row_by_row(add: Op, rows: int) -> bool:
    """Return whether both operands have `rows` rows, all of them, in their order."""
    numbers, axes = add.i[4:8], len(add.i[8:]) // 3
    ones = [1] * (axes - 1)
    zeros = [0] * (axes - 1)
    table = [*ones, rows, *zeros, 1, *zeros, 1]
    return numbers == [rows, 0, rows, 0] and add.i[8:] == table


def _join_gate_behind(graph: Graph, gate: Op) -> bool:
    """Join a ReLU's gate to the gradient of what was before the ReLU.

    Pooling has noted where nothing is left; a norm computes anew what it gave.
    """
    readers = graph.readers(gate.i[1])
    if len(readers) != 1 or gate.f[0] != 1:
        return False
    host, grad = graph.writer(gate.i[2]), readers[0]
    if not host.flags & OpFlag.RELU or host.i[1] != gate.i[2] or grad.i[0] != gate.i[1]:
        return False
    is_pool = host.kind == OpKind.MAX_POOL and grad.kind == OpKind.MAX_POOL_GRAD
    is_norm = (
        host.kind == OpKind.BATCH_NORM_2D and grad.kind == OpKind.BATCH_NORM_2D_GRAD
    )
    if is_pool and grad.i[2] == host.i[2]:
        grad.i[0] = gate.i[0]
    elif is_norm and grad.i[3] == host.i[0] and grad.i[2] == NONE:
        grad.i[0] = gate.i[0]
        if host.i[10] == NONE:
            grad.flags |= OpFlag.RELU
        else:
            grad.i[2] = gate.i[2]
    else:
        return False
    graph.remove(gate)
    graph.update(grad)
    return True


def _join_pool_grad(graph: Graph, pool: Op) -> None:
    """Join the gradient of pooling to that of the weight of a first convolution.

    Windows follow each other, and no other operation needs the gradient of all pixels.
    """
    readers = graph.readers(pool.i[1])
    height, width = pool.i[4:10], pool.i[10:16]
    is_plain = all(
        axis[2] > 0 and axis[3:] == [axis[2], 0, 1] for axis in (height, width)
    )
    if not is_plain or [op.kind for op in readers] != [OpKind.CONV_GRAD_WEIGHT]:
        return
    (conv,) = readers
    if conv.i[0] != pool.i[1] or conv.i[1] == pool.i[1] or conv.i[18] != NONE:
        return
    if not _has_images_of(pool, conv):
        return
    conv.i[0] = pool.i[0]
    conv.i[18:] = [pool.i[2], height[2], width[2], height[1], width[1]]
    graph.remove(pool)
    graph.update(conv)


def _has_images_of(pool: Op, conv: Op) -> bool:
    """Return whether what is pooled are the images of a convolution, not a view."""
    sizes = []
    for pixels, kernel, stride, padding, dilation in zip(
        *(conv.i[n : n + 2] for n in range(5, 15, 2)), strict=True
    ):
        reach = (kernel - 1) * dilation + 1
        sizes.append((pixels + 2 * padding - reach) // stride + 1)
    return [conv.i[3], *sizes] == [pool.i[3], pool.i[4], pool.i[10]]


def _join_pool(graph: Graph, buffers: list[Buffer], pool: Op) -> None:
    """Join pooling by windows that follow each other to the convolution before it."""
    conv = graph.writer(pool.i[0])
    if conv.kind != OpKind.CONV or conv.flags or graph.readers(pool.i[0]) != [pool]:
        return
    if not _has_images_of(pool, conv):
        return
    (_, _, *height), (width, _, *columns) = pool.i[4:10], pool.i[10:16]
    kernel = height[0], columns[0]
    in_channels, out_channels, groups = conv.i[2:5]
    num_terms = in_channels // groups * conv.i[7] * conv.i[8]
    is_plain = height == [kernel[0]] * 2 + [0, 1] and columns == [kernel[1]] * 2 + [
        0,
        1,
    ]
    if 0 in kernel or not is_plain or num_terms > K_BLOCK:
        return
    if buffers[pool.i[0]].features < LARGE:
        return
    room = Buffer(out_channels * kernel[0] * width * PANEL, is_room=True)
    buffers.append(room)
    i = [conv.i[0], pool.i[1], *conv.i[2:17], 0, pool.i[2], len(buffers) - 1, *kernel]
    graph.replace(pool, Op(OpKind.CONV_MAX_POOL, i, flags=pool.flags))
    graph.remove(conv)
