"""ATen operations that become several operations of kernels.

Each is computed as its formula says, operation by operation, rounded after each.
"""

from samestep.kernels.aten import indexing
from samestep.kernels.compositions import (
    comparisons,
    draws,
    extremes,
    gates,
    interpolation,
    matrices,
    moves,
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
    **draws.LOWERINGS,
    **gates.LOWERINGS,
    **indexing.POSITIONS,
    **interpolation.LOWERINGS,
    **matrices.LOWERINGS,
    **piecewise.LOWERINGS,
    **powers.LOWERINGS,
    **repeats.LOWERINGS,
    **statistics.LOWERINGS,
}
AFTERWARDS: Lowerings = {**extremes.LOWERINGS, **moves.LOWERINGS}
"""What is lowered so if nothing else takes it."""
