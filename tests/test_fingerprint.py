import hashlib

import pytest
import torch
from torch import nn

from samestep.errors import ReplicasDiffer
from samestep.state.fingerprint import fingerprint
from samestep.verification import replicas


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


class AnotherHasOther:
    """Worker 1 tells of a fingerprint of zeros."""

    workers = 2

    def merge(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.mark.parametrize(
    ("is_own", "says", "not_said"),
    [
        (True, "hidden from samestep is likely .*`samestep check`", "memory"),
        (False, "a fault of memory or processor is likely", "samestep check"),
    ],
)
def test_replicas_that_differ_are_not_blamed_on_memory_where_code_is_likelier(
    is_own: bool, says: str, not_said: str
) -> None:
    with pytest.raises(ReplicasDiffer, match=says) as caught:
        replicas.common_fingerprint(nn.Linear(1, 1), 0, AnotherHasOther(), is_own)
    assert "worker 1 has 0000000000000000" in str(caught.value)
    assert not_said not in str(caught.value)


def test_memory_layout_does_not_matter() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    assert fingerprint({"w": value.t().contiguous().t()}) == fingerprint({"w": value})
