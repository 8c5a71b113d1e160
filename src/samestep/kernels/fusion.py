"""Join neighbouring operations of a program; no bit changes.

An operation that alone reads the result of another can often be part of it, which
saves a pass over memory.
"""

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.program import NONE, Op


HOSTS = {OpKind.LINEAR: 6, OpKind.BATCH_NORM: 11}
"""Operations that end with an activation, and where the stream of dropout stands."""


def fuse(ops: list[Op]) -> list[Op]:
    """Return the operations with activations and gates joined to what is before."""
    for op in list(ops):
        if op.kind == OpKind.ACTIVATE and op.flags == OpFlag.RELU:
            _join_relu(ops, op)
    for op in list(ops):
        if op.kind == OpKind.ACTIVATE and op.flags == OpFlag.DROPOUT:
            _join_dropout(ops, op)
    for op in list(ops):
        if op.kind == OpKind.GATE:
            _join_gate(ops, op)
    return ops


def _writer(ops: list[Op], buffer: int) -> Op:
    return next(op for op in ops if buffer in op.writes)


def _readers(ops: list[Op], buffer: int) -> list[Op]:
    return [op for op in ops if buffer in op.reads]


def _join_relu(ops: list[Op], relu: Op) -> None:
    host = _writer(ops, relu.i[0])
    is_free = host.kind in HOSTS and not host.flags & OpFlag.RELU
    if is_free and len(_readers(ops, relu.i[0])) == 1:
        host.i[1] = relu.i[1]
        host.flags |= OpFlag.RELU
        ops.remove(relu)


def _join_dropout(ops: list[Op], dropout: Op) -> None:
    """Join dropout to the ReLU before it, and its gradient to that of the ReLU.

    What is left of an output that was dropped is zero, as if the ReLU had cut it off.
    """
    host = _writer(ops, dropout.i[0])
    if (
        host.kind not in HOSTS
        or not host.flags & OpFlag.RELU
        or host.flags & OpFlag.DROPOUT
    ):
        return
    gates = [op for op in _readers(ops, dropout.i[0]) if op is not dropout]
    stream = dropout.i[3]
    drops = [_writer(ops, gate.i[0]) for gate in gates if gate.kind == OpKind.GATE]
    is_joined = len(drops) == len(gates) and all(
        drop.kind == OpKind.ACTIVATE
        and drop.flags == OpFlag.DROPOUT
        and drop.i[3] == stream
        and len(_readers(ops, drop.i[1])) == 1
        for drop in drops
    )
    if not is_joined:
        return
    for gate, drop in zip(gates, drops, strict=True):
        gate.i[0], gate.i[2] = drop.i[0], dropout.i[1]
        gate.f[0] = 1 / (1 - dropout.f[0])
        ops.remove(drop)
    host.i[1], host.i[HOSTS[host.kind]] = dropout.i[1], stream
    host.f[-1] = dropout.f[0]
    host.flags |= OpFlag.DROPOUT
    ops.remove(dropout)


def _join_gate(ops: list[Op], gate: Op) -> None:
    """Join a gate to the product whose result it changes."""
    host = _writer(ops, gate.i[0])
    is_free = host.kind == OpKind.LINEAR_GRAD_INPUT and host.i[5] == NONE
    if is_free and len(_readers(ops, gate.i[0])) == 1:
        host.i[1], host.i[5], host.f[0] = gate.i[1], gate.i[2], gate.f[0]
        ops.remove(gate)
