import math

import pytest
import torch

from caravan.config import PrivacyConfig
from caravan.data.records import Example
from caravan.errors import PrivacyError
from caravan.training.noise import SeededNoise
from caravan.training.sampling import draw, physical_batches, sampling_rate, steps_per_epoch, units_of


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(torch.Generator().manual_seed(seed))


def of(user: str | None) -> Example:
    return Example("a", ("d0",), columns={} if user is None else {"user": user})


# Units


def test_each_example_is_a_unit_unless_users_are():
    examples = [of("ann"), of("bob"), of("ann")]
    assert units_of(examples, PrivacyConfig()) == [[0], [1], [2]]
    assert units_of(examples, PrivacyConfig(unit="user", user_column="user")) == [[0, 2], [1]]


def test_users_without_a_column_or_a_name_are_refused():
    with pytest.raises(PrivacyError, match=r"needs privacy.user_column"):
        units_of([of("ann")], PrivacyConfig(unit="user"))
    for user in (None, ""):
        with pytest.raises(PrivacyError, match='query 2 has no value in the column "user"'):
            units_of([of("ann"), of(user)], PrivacyConfig(unit="user", user_column="user"))


@pytest.mark.parametrize(
    ("units", "batch", "rate", "steps"),
    [(1000, 100, 0.1, 10), (1049, 100, 100 / 1049, 10), (1051, 100, 100 / 1051, 11), (50, 100, 1.0, 1), (1, 1, 1.0, 1)],
)
def test_an_epoch_sees_each_unit_about_once(units, batch, rate, steps):
    assert sampling_rate(units, batch) == pytest.approx(rate)
    assert steps_per_epoch(units, batch) == steps


# Poisson sampling


def test_draws_have_the_statistics_of_independent_inclusion():
    source, units, rate, draws = seeded(), [[number] for number in range(60)], 0.15, 4000
    seen = torch.zeros(draws, 60)
    for row in range(draws):
        drawn = draw(units, rate, 1, source)
        seen[row, [own[0] for own in drawn]] = 1
    # Six standard deviations of each estimate; the seed makes it repeat.
    shares = seen.mean(dim=0)
    assert float((shares - rate).abs().max()) < 6 * math.sqrt(rate * (1 - rate) / draws)
    sizes = seen.sum(dim=1)
    variance = 60 * rate * (1 - rate)  # binomial; a batch of fixed size would have none
    assert abs(float(sizes.mean()) - 60 * rate) < 6 * math.sqrt(variance / draws)
    assert float(sizes.var()) == pytest.approx(variance, rel=6 * math.sqrt(2 / draws))
    relations = torch.corrcoef(seen.T) - torch.eye(60)  # of units within a draw
    assert float(relations.abs().max()) < 6 / math.sqrt(draws)
    later = torch.corrcoef(torch.stack([sizes[:-1], sizes[1:]]))[0, 1]  # of one draw with the next
    assert abs(float(later)) < 6 / math.sqrt(draws)


def test_at_rate_one_everything_is_drawn_and_a_draw_may_be_empty():
    units = [[0, 1], [2]]
    assert draw(units, 1.0, 2, seeded()) == units
    assert draw(units, 0.0, 2, seeded()) == []


def test_of_a_user_at_most_so_many_examples_are_drawn_each_equally_often():
    source, counts, draws = seeded(), torch.zeros(5), 3000
    for _ in range(draws):
        (own, other) = draw([[0, 1, 2, 3, 4], [5]], 1.0, 2, source)
        assert len(set(own)) == 2
        assert other == [5]
        counts[own] += 1
    assert float((counts / draws - 0.4).abs().max()) < 6 * math.sqrt(0.4 * 0.6 / draws)


# Physical batches


def test_batches_hold_so_many_examples_and_those_of_like_length():
    lengths = [9, 1, 8, 2, 7, 3]
    assert physical_batches([[number] for number in range(6)], lengths, 2) == [[1, 3], [5, 4], [2, 0]]
    assert physical_batches([], lengths, 2) == []


def test_a_unit_is_never_cut():
    lengths = [1] * 9
    drawn = [[0, 1], [2, 3], [4, 5, 6, 7], [8]]
    assert physical_batches(drawn, lengths, 3) == [[0, 1], [2, 3], [4, 5, 6, 7], [8]]
    assert physical_batches(drawn, lengths, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
