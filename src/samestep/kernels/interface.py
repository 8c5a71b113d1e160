"""Mirrors the structures of csrc/samestep.h for ctypes; that header explains them."""

from ctypes import (
    CFUNCTYPE,
    Structure,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from enum import IntEnum, IntFlag


SPECIFICATION = 1
"""The version of docs/arithmetic.md: which operations decide the bits."""
ARITHMETIC = f"portable-{SPECIFICATION}"
"""Its name in runs and checkpoints."""
INTERFACE = 4
"""The version of samestep.h: how Python and the library talk."""


class OpKind(IntEnum):
    """The operations of a program, `OP_...` in the header."""

    GATHER_BYTES = 0
    LOAD = 1
    TRANSPOSE = 2
    LINEAR = 3
    LINEAR_GRAD_INPUT = 4
    LINEAR_GRAD_WEIGHT = 5
    GRAD_BIAS = 6
    BATCH_NORM = 7
    BATCH_NORM_GRAD = 8
    CROSS_ENTROPY = 9
    SQUARED_ERROR = 10
    ACTIVATE = 11
    GATE = 12
    STORE = 13
    MAX_POOL = 14
    MAX_POOL_GRAD = 15
    MEAN_POOL = 16
    MEAN_POOL_GRAD = 17
    BATCH_NORM_2D = 18
    BATCH_NORM_2D_GRAD = 19
    ATTENTION = 20
    ATTENTION_GRAD = 21
    CONV = 22
    CONV_GRAD_INPUT = 23
    CONV_GRAD_WEIGHT = 24
    SUM_ROWS = 25
    UNARY = 26
    BINARY = 27
    LOAD_TOKENS = 28
    EMBEDDING = 29
    EMBEDDING_GRAD = 30
    LAYER_NORM = 31
    LAYER_NORM_GRAD = 32
    LSTM = 33
    GRU = 34
    RNN = 35
    LSTM_GRAD = 36
    GRU_GRAD = 37
    RNN_GRAD = 38
    MATMUL = 39
    SOFTMAX = 40
    ADD_LEAVES = 41
    CONV_MAX_POOL = 42
    MEASURE = 43
    PICK = 44
    PICK_GRAD = 45
    DRAW = 46
    COMBINE = 47


class OpFlag(IntFlag):
    """Parts of an operation that can be left out, `OP_...` in the header."""

    RELU = 1
    DROPOUT = 2
    EVAL = 4
    CAUSAL = 8
    REVERSED = 16
    LAST_STATE = 32
    LEAVES = 64
    SLOPE = 128
    MASKED = 256


class Unary(IntEnum):
    """The functions of `OpKind.UNARY`, `UNARY_...` in the header."""

    COPY = 0
    FILL = 1
    """The number f[0], for any x."""
    NEG = 2
    ABS = 3
    RECIPROCAL = 4
    SQRT = 5
    RSQRT = 6
    EXP = 7
    LOG = 8
    TANH = 9
    SIGMOID = 10
    ERF = 11
    SIN = 12
    COS = 13
    GELU = 14
    GELU_TANH = 15
    SILU = 16
    EXPM1 = 17
    LOG1P = 18
    GELU_SLOPE = 19
    """GELU; its derivative takes the place of x."""
    FROM_INT = 20
    """int32 as floats."""
    TO_INT = 21
    """Floats as int32, cut off."""


class Binary(IntEnum):
    """The functions of `OpKind.BINARY`, `BINARY_...` in the header."""

    ADD = 0
    SUB = 1
    MUL = 2
    DIV = 3
    TANH_GRAD = 4
    SIGMOID_GRAD = 5
    GELU_GRAD = 6
    GELU_TANH_GRAD = 7
    SILU_GRAD = 8
    MAX = 9
    MIN = 10
    GREATER = 11
    """1 where a > b, else 0; the other comparisons likewise."""
    AT_LEAST = 12
    LESS = 13
    AT_MOST = 14
    EQUAL = 15
    WHERE = 16
    """a where b is not 0, else 0."""
    WHERE_NOT = 17


class OptimizerKind(IntEnum):
    """The optimizers of `Kernels.update`."""

    SGD = 0
    ADAM = 1
    ADAMW = 2


class Op(Structure):
    """One operation of a program."""

    _fields_ = (
        ("kind", c_int32),
        ("flags", c_int32),
        ("i", c_int64 * 36),
        ("f", c_float * 4),
    )


class Call(Structure):
    """What one call of a program needs besides the program.

    Pointers are addresses (`array.ctypes.data`, `tensor.data_ptr()`); None is NULL.
    The caller keeps the arrays alive during the call.
    """

    _fields_ = (
        ("buffers", c_void_p),
        ("parameters", c_void_p),
        ("running", c_void_p),
        ("capacity", c_int64),
        ("micro_batches", c_int64),
        ("starts", c_void_p),
        ("merges", c_void_p),
        ("keys", c_void_p),
        ("weight", c_float),
        ("slots_size", c_int32),
        ("slots", c_void_p),
        ("tail", c_int64),
        ("bytes", c_void_p),
        ("indices", c_void_p),
        ("inputs", c_void_p),
        ("labels", c_void_p),
        ("targets", c_void_p),
        ("losses", c_void_p),
        ("metrics", c_void_p),
        ("loss_sums", c_void_p),
        ("metric_sums", c_void_p),
        ("answers", c_void_p),
        ("outputs", c_void_p),
        ("partners", c_void_p),
        ("shares", c_void_p),
        ("tokens", c_void_p),
        ("constants", c_void_p),
    )


class Optimizer(Structure):
    """The numbers of one update that do not depend on the element."""

    _fields_ = (
        ("kind", c_int32),
        ("nesterov", c_int32),
        ("is_first", c_int32),
        ("lr", c_float),
        ("weight_decay", c_float),
        ("beta1", c_float),
        ("beta2", c_float),
        ("one_minus_beta1", c_float),
        ("one_minus_beta2", c_float),
        ("root", c_float),
        ("eps", c_float),
    )


class Hashes(Structure):
    """Hashes of what an update was given and what it left; it adds to them."""

    _fields_ = (("keys", c_void_p), ("gradient", c_uint64), ("parameters", c_uint64))


class Update(Structure):
    """An update that computes the gradients of matrices itself.

    `micro_batches` and `parts` are arrays int64 [n, 4]: `MicroBatch` and `UpdatePart`
    in the header.
    """

    _fields_ = (
        ("ops", c_void_p),
        ("call", c_void_p),
        ("micro_batches", c_void_p),
        ("num_micro_batches", c_int64),
        ("parts", c_void_p),
        ("num_parts", c_int64),
        ("optimizers", c_void_p),
        ("leaves", c_void_p),
        ("order", c_void_p),
        ("order_size", c_int64),
        ("parameters", c_void_p),
        ("state1", c_void_p),
        ("state2", c_void_p),
        ("hashes", c_void_p),
    )


class Kernels(Structure):
    """The kernels of one instruction set. Every call releases the GIL."""

    _fields_ = (
        ("isa", c_char_p),
        ("run", CFUNCTYPE(c_int64, c_void_p, c_int64, c_void_p)),
        ("tree_sum", CFUNCTYPE(None, *(c_void_p,) * 3, c_int64, c_int64)),
        (
            "update",
            CFUNCTYPE(
                *(None, *(c_void_p,) * 3, c_int64, *(c_void_p,) * 3),
                *(c_int64, c_int64, c_void_p),
            ),
        ),
        ("update_parts", CFUNCTYPE(None, c_void_p)),
        ("average", CFUNCTYPE(None, c_void_p, c_void_p, c_float, c_int64)),
        ("squared_norms", CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("scale", CFUNCTYPE(None, c_void_p, c_float, c_int64)),
        ("hash", CFUNCTYPE(c_uint64, c_void_p, c_void_p, c_int64, c_int64)),
        ("function", CFUNCTYPE(c_int, c_int32, c_void_p, c_void_p, c_int64)),
    )
