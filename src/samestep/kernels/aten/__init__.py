"""The lowerings of ATen operations, by their names, in one file for each kind.

A function takes what the arguments of an operation became, and appends operations of
the program or says what the result stands for. To add an operation, add a function
here and, if it computes something new, a kernel (CONTRIBUTING.md).
"""

from samestep.kernels.aten import (
    activations,
    attention,
    convolution,
    indexing,
    layer_norm,
    linear,
    norms,
    pointwise,
    pooling,
    recurrent,
    views,
)
from samestep.kernels.lowering import (
    Lowerings,
)


LOWERINGS: Lowerings = {
    **activations.LOWERINGS,
    **attention.LOWERINGS,
    **convolution.LOWERINGS,
    **indexing.LOWERINGS,
    **layer_norm.LOWERINGS,
    **linear.LOWERINGS,
    **norms.LOWERINGS,
    **pointwise.LOWERINGS,
    **pooling.LOWERINGS,
    **recurrent.LOWERINGS,
    **views.LOWERINGS,
}
