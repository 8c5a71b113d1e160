"""Numbers and foreign text as a reader sees them."""

import math
from typing import Any


MISSING = "\N{EN DASH}"
NOT_FINITE = "not finite"
Value = float | None


def number(value: Value, format_spec: str, unit: str = "") -> str:
    """`format(value, format_spec)`, or in words why there is no number."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return NOT_FINITE
    return format(value, format_spec).replace("-", "\N{MINUS SIGN}") + unit


def count(value: Value) -> str:
    """`55,000`."""
    return number(value, ",.0f")


def percent(value: Value, places: int = 1) -> str:
    """0.984 -> `98.4%`."""
    return number(value, f".{places}%")


def times(value: Value) -> str:
    """A speed-up, such as 1.84 and a multiplication sign."""
    return number(value, ".2f", "\N{MULTIPLICATION SIGN}")


def significant(value: Value) -> str:
    """Four significant digits, without an exponent where that is readable."""
    if value is None or not math.isfinite(value) or value == 0:
        return number(value, "g")
    if 1e-4 <= abs(value) < 1e6:
        places = max(0, 3 - math.floor(math.log10(abs(value))))
        return number(value, f",.{places}f")
    return number(value, ".3e")


def plain_name(name: str) -> str:
    """`absolute_error` -> `absolute error`."""
    return name.replace("_", " ")


def score(metric: str, value: Value) -> str:
    """`98.44%` for an accuracy, four digits for anything else."""
    return percent(value, 2) if metric == "accuracy" else significant(value)


def seconds(value: Value) -> str:
    """`85.0 µs`, `12.3 ms`, `8.31 s`, `12 min 5 s` or `3 h 20 min`."""
    if value is None or not math.isfinite(value) or value < 1:
        return prefixed(value, "s")
    if value < 120:
        return number(value, ".2f", " s")
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def prefixed(value: Value, unit: str) -> str:
    """Three significant digits and an SI prefix: `471 ps/byte`."""
    if value is None or not math.isfinite(value) or abs(value) >= 1 or not value:
        return number(value, ".4g", f" {unit}")
    power = min(4, -math.floor(math.log10(abs(value)) / 3))
    value *= 1000.0**power
    places = min(2, max(0, 2 - math.floor(math.log10(abs(value)))))
    return number(value, f".{places}f", f" {('', 'm', 'µ', 'n', 'p')[power]}{unit}")


def size(value: Value) -> str:
    """Bytes: `32 KiB`, `23.5 GiB`."""
    if value is None or not math.isfinite(value):
        return number(value, "g")
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return number(value, ",.4g", f" {unit}")
        value /= 1024
    return number(value, ",.4g", " TiB")


def interval(low: Value, high: Value, format_spec: str) -> str:
    """`1.80 to 1.88`."""
    if low is None or high is None:
        return MISSING
    return f"{number(low, format_spec)} to {number(high, format_spec)}"


def plural(amount: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def setting(value: Any) -> str:
    """A value of a recipe, a placement or an environment."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, float):
        return number(value, "g")
    return str(value)


def flat(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested sections as dotted names, such as `optimizer.lr`."""
    found: list[tuple[str, Any]] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def is_number(value: object) -> bool:
    """An int or a float, though not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
