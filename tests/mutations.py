"""Turns files that are valid into ones that are not: bytes, and values inside them."""

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import PurePath
from random import Random
from typing import Any

import tomli_w


DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 255, 2**31, 2**63 - 1, 2**63, 2**70, -(2**65)),
    *(0.0, -0.5, 1e308, 1e999, -1e999, math.nan, 5e-324, [], {}, [[]], [None], DEEP),
    *("", "x", "\0", "\x1b[2J", "\u202e", "../../../canary", "/dev/zero", "a" * 5_000),
    *("sha256:", "os:system", "é", "\ud800", "9" * 400, {"": {}}, {"a": DEEP}),
)
HEADERS = (
    *("'|O'", "'<V0'", "'<U3'", "[('a','<f4')]", "'<c16'", "'<f2'", "True", "[" * 90),
    *("(-1,)", "(2**60,)", "(1152921504606846976,8)", "9" * 50, "(9" + ",9" * 40 + ")"),
)
"""What may stand in the header of an array instead of something else."""
LITERALS = (b"9" * 10_000, b"1e999", b"-" * 9, b"[" * 5_000, b'{"a":' * 3_000, b"NaN")


def mutated(name: str, content: bytes, random: Random) -> bytes:
    """Return the content of the file `name`, changed in one to three places."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = STRUCTURED.get(PurePath(name).suffix, _change_bytes)
        if random.random() < 0.5:
            change = _change_bytes
        content = change(content, random)
    return content


def _change_bytes(content: bytes, random: Random) -> bytes:
    data = bytearray(content)
    at = random.randrange(len(data) + 1)
    match random.randrange(8):
        case 0 if data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        case 1 if data:
            data[at % len(data)] = random.choice((0, 1, 10, 27, 34, 127, 128, 255))
        case 2:
            del data[at:]
        case 3:
            del data[at : at + random.choice((1, 2, 4, 8, 64))]
        case 4:
            end = random.randrange(len(data) + 1)
            data[at:at] = data[min(at, end) : max(at, end)][:4_096]
        case 5:
            data[at:at] = random.randbytes(random.choice((1, 4, 8, 100)))
        case 6:
            size = random.choice((1, 2, 4, 8))
            number = random.choice(
                (0, 1, 2**31, 2**63, 2**64 - 1, random.getrandbits(64))
            )
            order = random.choice(("little", "big"))
            data[at : at + size] = (number % 256**size).to_bytes(size, order)
        case _:
            data[at:at] = random.choice(LITERALS)
    return bytes(data)


def _swap(value: Any, random: Random) -> Any:
    """Replace one value somewhere inside by any other, remove it, or double it."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        name = random.choice(list(value))
        match random.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != name}
            case 1:
                other = random.choice([s for s in STRANGE if isinstance(s, str)])
                return {(other if k == name else k): v for k, v in value.items()}
        return value | {name: _swap(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        there = value[at]
        instead = random.choice(([], [there, there], [_swap(there, random)]))
        return value[:at] + instead + value[at + 1 :]
    return random.choice(STRANGE)


def _change_json(content: bytes, random: Random) -> bytes:
    try:
        changed = _swap(json.loads(content), random)
        return json.dumps(changed).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return _change_bytes(content, random)


def _change_lines(content: bytes, random: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    if not lines:
        return _change_bytes(content, random)
    at = random.randrange(len(lines))
    lines[at] = _change_json(lines[at], random) + b"\n"
    return b"".join(lines)


def _change_toml(content: bytes, random: Random) -> bytes:
    try:
        return tomli_w.dumps(_swap(tomllib.loads(content.decode()), random)).encode()
    except Exception:  # not every value has a form in TOML
        return _change_bytes(content, random)


def _change_safetensors(content: bytes, random: Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = _change_json(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _change_npy(content: bytes, random: Random) -> bytes:
    """Change the header, which is the text of a Python dictionary."""
    end = 10 + int.from_bytes(content[8:10], "little")
    header = content[10:end].decode("latin-1")
    old = random.choice(("'<f8'", "'>f8'", "False", "(90, 64)", "(90,", "64", "{", "}"))
    new = random.choice(HEADERS)
    raw = header.replace(old, new).encode("latin-1")
    return content[:8] + (len(raw) % 65_536).to_bytes(2, "little") + raw + content[end:]


STRUCTURED: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _change_json,
    ".jsonl": _change_lines,
    "": _change_json,
    ".toml": _change_toml,
    ".safetensors": _change_safetensors,
    ".npy": _change_npy,
    ".csv": _change_bytes,
}
