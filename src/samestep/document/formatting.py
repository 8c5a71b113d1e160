"""Numbers and settings as a reader sees them."""

import math
from typing import Any, TypeGuard

from samestep.system.json_values import JsonObject


MISSING = "\N{EN DASH}"
NOT_FINITE = "not finite"
Value = float | None


def is_finite(value: Value) -> TypeGuard[float]:
    """Return whether there is a number, neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


def number(value: Value, format_spec: str, unit: str = "") -> str:
    """Return `format(value, format_spec)`, or say why there is no number."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return NOT_FINITE
    return format(value, format_spec).replace("-", "\N{MINUS SIGN}") + unit


def count(value: Value) -> str:
    """Return `55,000`."""
    return number(value, ",.0f")


def percent(value: Value, places: int = 1) -> str:
    """Return `98.4%` for 0.984."""
    return number(value, f".{places}%")


def times(value: Value) -> str:
    """Return a speed-up, such as 1.84 and a multiplication sign."""
    return number(value, ".2f", "\N{MULTIPLICATION SIGN}")


def significant(value: Value) -> str:
    """Return four significant digits, without an exponent where that is readable."""
    if not is_finite(value) or value == 0:
        return number(value, "g")
    if 1e-4 <= abs(value) < 1e6:
        places = max(0, 3 - math.floor(math.log10(abs(value))))
        return number(value, f",.{places}f")
    return number(value, ".3e")


def plain_name(name: str) -> str:
    """Return `absolute error` for `absolute_error`."""
    return name.replace("_", " ")


def score(metric: str, value: Value) -> str:
    """Return `98.44%` for an accuracy, `0.0553` for a loss, else four digits."""
    if metric == "loss":
        return number(value, ".4f")
    return percent(value, 2) if metric == "accuracy" else significant(value)


def seconds(value: Value) -> str:
    """Return `85.0 µs`, `12.3 ms`, `8.31 s`, `12 min 5 s` or `3 h 20 min`."""
    if not is_finite(value) or value < 1:
        return prefixed(value, "s")
    if value < 120:
        return number(value, ".2f", " s")
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def prefixed(value: Value, unit: str) -> str:
    """Return three significant digits and an SI prefix: `471 ps/byte`."""
    if not is_finite(value) or value == 0 or abs(value) >= 1:
        return number(value, ".4g", f" {unit}")
    power = min(4, -math.floor(math.log10(abs(value)) / 3))
    value *= 1000.0**power
    places = min(2, max(0, 2 - math.floor(math.log10(abs(value)))))
    return number(value, f".{places}f", f" {('', 'm', 'µ', 'n', 'p')[power]}{unit}")


def size(value: Value) -> str:
    """Return a number of bytes as `32 KiB` or `23.5 GiB`."""
    if not is_finite(value):
        return number(value, "g")
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return number(value, ",.4g", f" {unit}")
        value /= 1024
    return number(value, ",.4g", " TiB")


def interval(low: Value, high: Value, format_spec: str) -> str:
    """Return `1.80 to 1.88`."""
    if low is None or high is None:
        return MISSING
    return f"{number(low, format_spec)} to {number(high, format_spec)}"


def digest(sha256: str | None) -> str:
    """Return the first 12 digits of a fingerprint."""
    return sha256[:12] if sha256 else MISSING


def plural(amount: int, noun: str) -> str:
    """Return `1 worker` or `2 workers`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def setting(value: Any) -> str:
    """Return a value of a recipe, a placement or an environment as text."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "none"
    return number(value, "g") if isinstance(value, float) else str(value)


def flat(fields: JsonObject, prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested sections as dotted names, such as `optimizer.lr`."""
    pairs: list[tuple[str, Any]] = []
    for name, value in fields.items():
        nested = isinstance(value, dict)
        full_name = f"{prefix}{name}"
        pairs += flat(value, f"{full_name}.") if nested else [(full_name, value)]
    return pairs


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
