"""ATen operations that become several operations of kernels.

Each is computed as its formula says, operation by operation, rounded after each.
"""

from samestep.kernels.aten import indexing
from samestep.kernels.compositions import (
    comparisons,
    gates,
    matrices,
    piecewise,
    powers,
    repeats,
    statistics,
)
from samestep.kernels.lowering import (
    Lowerings,
)


LOWERINGS: Lowerings = {
    **comparisons.LOWERINGS,
    **gates.LOWERINGS,
    **indexing.POSITIONS,
    **matrices.LOWERINGS,
    **piecewise.LOWERINGS,
    **powers.LOWERINGS,
    **repeats.LOWERINGS,
    **statistics.LOWERINGS,
}
