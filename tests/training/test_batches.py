import itertools
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.training.batches import epoch_batches, noise_source


def padding(batches: list[list[int]], lengths: list[int]) -> int:
    """Tokens spent on padding each batch to its longest text."""
    return sum(max(lengths[i] for i in batch) - lengths[index] for batch in batches for index in batch)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=300),
    batch_size=st.integers(1, 64),
    seed=st.integers(0, 2**90),
    epoch=st.integers(0, 2**32 - 1),
)
def test_every_example_comes_once_an_epoch_in_full_batches_but_one(lengths, batch_size, seed, epoch):
    batches = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
    short = [len(batch) for batch in batches if len(batch) != batch_size]
    assert short == ([len(lengths) % batch_size] if len(lengths) % batch_size else [])


def test_the_same_seed_and_epoch_give_the_same_batches():
    lengths = [random.Random(0).randint(1, 30) for _ in range(100)]
    assert epoch_batches(lengths, 8, seed=3, epoch=2) == epoch_batches(lengths, 8, seed=3, epoch=2)


def test_other_seeds_and_epochs_give_other_orders_without_any_collision():
    # The last ones would meet under seed * 1_000_003 + epoch, or under a generator that keeps 32 bits of its seed.
    pairs = list(itertools.product(range(40), range(40)))
    pairs += [(0, 1_000_003), (2**32, 0), (2**32 + 1, 0), (0, 2**31), (7 * 2**32 + 5, 0), (10**30, 0)]
    orders = {str(epoch_batches([1] * 64, 8, seed=seed, epoch=epoch)) for seed, epoch in pairs}
    assert len(orders) == len(pairs)


def test_a_small_data_set_is_grouped_anew_each_epoch():
    lengths = list(range(1, 65))  # all different: sorting all of them would always give the same eight groups
    groups = [{frozenset(batch) for batch in epoch_batches(lengths, 8, seed=0, epoch=epoch)} for epoch in range(5)]
    for ours, theirs in itertools.combinations(groups, 2):
        assert len(ours & theirs) <= 2


def test_like_lengths_together_waste_less_than_half_of_what_random_batches_waste():
    source = random.Random(1)
    lengths = [min(128, 3 + int(source.lognormvariate(2.5, 0.7))) for _ in range(2000)]
    shuffled = source.sample(range(len(lengths)), len(lengths))
    at_random = [shuffled[start : start + 32] for start in range(0, len(shuffled), 32)]
    for epoch in range(3):
        bucketed = epoch_batches(lengths, 32, seed=0, epoch=epoch)
        assert padding(bucketed, lengths) < 0.25 * padding(at_random, lengths)


def test_long_and_short_batches_come_in_mixed_order():
    lengths = list(range(400))
    means = [sum(batch) / len(batch) for batch in epoch_batches(lengths, 10, seed=0, epoch=0)]
    rises = sum(later > earlier for earlier, later in itertools.pairwise(means))
    assert 8 < rises < 31  # 39 neighbours: sorted batches would rise nearly always, shuffled ones about half the time


def test_no_examples_make_no_batches():
    assert epoch_batches([], 8, seed=0, epoch=0) == []


def draws(seed: int, epoch: int, step: int) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=noise_source(seed, epoch, step)).tolist())


def test_the_same_step_of_the_same_training_draws_the_same_noise():
    torch.manual_seed(5)  # the global generator has no say
    assert draws(3, 2, 1) == draws(3, 2, 1)
    assert noise_source(3, 2, 1).device == torch.device("cpu")


def test_other_seeds_epochs_and_steps_draw_other_noise():
    # The last ones would meet under sums and products of the numbers, or where only 32 bits of a seed count.
    steps = list(itertools.product(range(12), range(12), range(12)))
    steps += [(2**32, 0, 0), (2**32 + 1, 0, 0), (7 * 2**32 + 5, 0, 0), (2**63 - 1, 0, 0), (0, 1000, 0), (0, 0, 1000)]
    assert len({draws(*numbers) for numbers in steps}) == len(steps)
