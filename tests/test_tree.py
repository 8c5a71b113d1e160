from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from samestep.core import tree
from samestep.core.tree import Range


@st.composite
def ownerships(draw: st.DrawFn) -> tuple[int, list[Range]]:
    """A number of leaves and contiguous ranges that share them; some may be empty."""
    num_leaves = draw(st.integers(1, 40))
    inner = draw(st.lists(st.integers(0, num_leaves), max_size=8))
    cuts = [0, *sorted(inner), num_leaves]
    return num_leaves, list(pairwise(cuts))


def expression(left: str, right: str) -> str:
    return f"({left}+{right})"


def whole(num_leaves: int) -> str:
    leaves = {(m, m + 1): str(m) for m in range(num_leaves)}
    return tree.reduce(num_leaves, leaves, expression)


def test_a_range_splits_at_the_largest_power_of_two_below_its_length() -> None:
    assert whole(7) == "(((0+1)+(2+3))+((4+5)+6))"
    assert whole(8) == "(((0+1)+(2+3))+((4+5)+(6+7)))"


@given(ownerships())
def test_every_ownership_gives_the_same_sum(case: tuple[int, list[Range]]) -> None:
    num_leaves, shares = case
    partials: dict[Range, str] = {}
    for owned in shares:
        stack: list[str] = []
        for leaf in range(*owned):
            stack.append(str(leaf))
            for _ in range(tree.num_merges(leaf, owned, num_leaves)):
                right = stack.pop()
                stack[-1] = expression(stack[-1], right)
        partials |= zip(tree.subtrees(owned, num_leaves), stack, strict=True)
    assert tree.reduce(num_leaves, partials, expression) == whole(num_leaves)


@given(ownerships())
def test_subtrees_cover_each_owned_leaf_once_and_are_maximal(
    case: tuple[int, list[Range]],
) -> None:
    num_leaves, shares = case
    for owned in shares:
        nodes = tree.subtrees(owned, num_leaves)
        leaves = [leaf for node in nodes for leaf in range(*node)]
        assert leaves == list(range(*owned))
        assert len(nodes) <= 2 * num_leaves.bit_length()
