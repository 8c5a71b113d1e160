"""Bandwidths and latencies with units, such as `10Gbit` and `50us`."""

import re

from samestep.errors import PlacementError


PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_BANDWIDTH = re.compile(r"([0-9.]+)\s*([kKMGT]?)(bit|bps|B)(?:/s|ps)?")
_LATENCY = re.compile(r"([0-9.]+)\s*([a-zµ]+)")


def bandwidth(text: str) -> float:
    """Return bytes per second for `10Gbit` or `1.25GB`. Raises PlacementError."""
    match = _BANDWIDTH.fullmatch(text.strip())
    number = _positive(match.group(1)) if match else None
    if match is None or number is None:
        raise PlacementError(
            "A bandwidth is a positive number with a unit of bits or bytes per second, "
            f"such as `10Gbit` or `1GB`; received `{text}`."
        )
    prefix = PREFIXES[match.group(2).replace("K", "k")]
    return number * prefix / (1 if match.group(3) == "B" else 8)


def latency(text: str) -> float:
    """Return seconds for `50us`, `0.1ms` or `1s`. Raises PlacementError."""
    match = _LATENCY.fullmatch(text.strip())
    number = _positive(match.group(1)) if match else None
    if match is None or number is None or match.group(2) not in TIMES:
        raise PlacementError(
            "A latency is a positive number with a unit of time (s, ms, us, ns), such "
            f"as `50us`; received `{text}`."
        )
    return number * TIMES[match.group(2)]


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:  # such as 1.2.3
        return None
    return number if number > 0 else None
