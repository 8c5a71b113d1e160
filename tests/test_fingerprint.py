import hashlib

import torch

from samestep.fingerprint import fingerprint


def test_the_fingerprint_is_the_documented_one() -> None:
    state = {
        "größe": torch.tensor([[1.0, -0.0], [2.5, 3.0]]),
        "count": torch.tensor(7, dtype=torch.int64),
    }
    expected = hashlib.sha256(
        "größe".encode()
        + b"float322,2"
        + bytes.fromhex("0000803f000000800000204000004040")
        + b"countint64"
        + (7).to_bytes(8, "little")
    )
    assert fingerprint(state) == expected.hexdigest()


def test_a_single_bit_changes_it() -> None:
    zero = fingerprint({"w": torch.zeros(3)})
    assert zero != fingerprint({"w": torch.tensor([0.0, -0.0, 0.0])})
    assert zero != fingerprint({"v": torch.zeros(3)})
    assert zero != fingerprint({"w": torch.zeros(3, 1)})
    assert zero != fingerprint({"w": torch.zeros(3, dtype=torch.int32)})


def test_memory_layout_does_not_matter() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    assert fingerprint({"w": value.t().contiguous().t()}) == fingerprint({"w": value})
