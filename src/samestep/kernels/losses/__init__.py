"""Losses of the user's own: their operations, and what is measured of samples."""

from samestep.kernels.losses import functional, picks, sums
from samestep.kernels.lowering import Lowerings


LOWERINGS: Lowerings = {
    **functional.LOWERINGS,
    **picks.LOWERINGS,
    **sums.LOWERINGS,
}
