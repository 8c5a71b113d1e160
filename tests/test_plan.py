import torch
from hypothesis import given
from hypothesis import strategies as st

from samestep.core.ownership import pieces, shares
from samestep.core.plan import Plan, derive_seed


plans = st.builds(
    Plan,
    num_samples=st.integers(1, 300),
    global_batch=st.integers(1, 70),
    micro_batches=st.integers(1, 12),
    seed=st.integers(0, 2**62),
)


def micro_batches(plan: Plan, epoch: int) -> list[list[int]]:
    order = plan.order(epoch)
    return [
        plan.micro_batch(order, step, m).tolist()
        for step in range(plan.steps_per_epoch)
        for m in range(plan.micro_batches)
    ]


@given(plans, st.integers(0, 5))
def test_every_sample_comes_once_in_an_epoch(plan: Plan, epoch: int) -> None:
    samples = [sample for micro in micro_batches(plan, epoch) for sample in micro]
    assert sorted(samples) == list(range(plan.num_samples))


@given(plans)
def test_the_micro_batches_of_a_step_differ_in_size_by_at_most_one(plan: Plan) -> None:
    order = plan.order(0)
    for step in range(plan.steps_per_epoch):
        sizes = [
            len(plan.micro_batch(order, step, m)) for m in range(plan.micro_batches)
        ]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == plan.batch_size(step)


@given(plans)
def test_the_order_is_a_pure_function_of_seed_and_epoch(plan: Plan) -> None:
    torch.manual_seed(1)
    first = plan.order(3)
    torch.manual_seed(2)
    assert first.equal(plan.order(3))


def test_another_epoch_and_another_seed_give_another_order() -> None:
    plan, other = Plan(1000, 10, 2, seed=0), Plan(1000, 10, 2, seed=1)
    assert not plan.order(0).equal(plan.order(1))
    assert not plan.order(0).equal(other.order(0))


@given(st.integers(1, 64), st.integers(1, 64))
def test_shares_are_contiguous_even_and_complete(count: int, workers: int) -> None:
    owned = shares(count, workers)
    assert [m for share in owned for m in range(*share)] == list(range(count))
    sizes = [end - start for start, end in owned]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 1000), st.integers(1, 50))
def test_pieces_cut_everything(length: int, count: int) -> None:
    cuts = pieces(length, count)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, length, count + 1)


def test_seeds_for_different_purposes_differ() -> None:
    purposes = [("order", 1), ("order", 2), ("step", 1, 2), ("step", 12), ("model",)]
    seeds = {derive_seed(0, *purpose) for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
