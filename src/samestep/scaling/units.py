"""Bandwidths and latencies with units, such as `10Gbit` and `50us`."""

import re
from collections.abc import Mapping

from samestep.errors import PlacementError


SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BYTES_PER_SECOND = {
    f"{prefix}{unit}{per_second}": factor * (1 if unit == "B" else 1 / 8)
    for prefix, factor in PREFIXES.items()
    for unit in ("bit", "bps", "B")
    for per_second in ("", "/s", "ps")
}


def bandwidth(text: str) -> float:
    """Return bytes per second for `10Gbit` or `1.25GB`. Raises PlacementError."""
    rule = (
        "A bandwidth is a positive number with a unit of bits or bytes per second, "
        "such as `10Gbit` or `1GB`"
    )
    return _number(text, BYTES_PER_SECOND, rule)


def latency(text: str) -> float:
    """Return seconds for `50us`, `0.1ms` or `1s`. Raises PlacementError."""
    rule = (
        "A latency is a positive number with a unit of time (s, ms, us, ns), such as "
        "`50us`"
    )
    return _number(text, SECONDS, rule)


def _number(text: str, units: Mapping[str, float], rule: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(\S+)", text.strip(), re.ASCII)
    factor = units.get(match[2]) if match else None
    if match is None or factor is None or float(match[1]) == 0:
        raise PlacementError(f"{rule}; received `{text}`.")
    return float(match[1]) * factor
