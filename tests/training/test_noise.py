import math
import os

import pytest
import torch

from caravan.training.noise import SeededNoise, SystemNoise, gaussians, noised, secret_generator


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(torch.Generator().manual_seed(seed))


@pytest.fixture(params=["system", "seeded"])
def source(request: pytest.FixtureRequest) -> SystemNoise | SeededNoise:
    return SystemNoise() if request.param == "system" else seeded()


def test_uniforms_are_even_over_the_unit_interval(source):
    numbers = source.uniforms(100_000)
    assert numbers.dtype == torch.float64
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    shares = torch.histc(numbers, bins=10, min=0, max=1) / 100_000
    assert float((shares - 0.1).abs().max()) < 0.01  # ten standard deviations: also where nothing is seeded
    assert torch.equal((numbers * 2**53) % 1, torch.zeros(100_000, dtype=torch.float64))
    assert len(source.uniforms(0)) == 0


def test_the_systems_numbers_come_from_its_cryptographic_generator(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "urandom", lambda count: (asked.append(count), b"\xff" * 8 + bytes(count - 8))[1])
    assert SystemNoise().uniforms(3).tolist() == [1 - 2.0**-53, 0.0, 0.0]
    assert asked == [24]


def test_two_system_sources_draw_different_numbers():
    assert not torch.equal(SystemNoise().uniforms(10), SystemNoise().uniforms(10))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 131_072, 131_075])
def test_as_many_gaussians_come_as_are_asked_for(count):
    assert gaussians(count, 1.0, seeded()).shape == (count,)


def test_gaussians_have_the_moments_and_tails_of_a_gaussian(source):
    count = 400_000
    numbers = gaussians(count, 3.0, source) / 3.0
    # The bounds are six standard deviations of each estimate.
    assert abs(float(numbers.mean())) < 6 / math.sqrt(count)
    assert abs(float(numbers.square().mean()) - 1) < 6 * math.sqrt(2 / count)
    assert abs(float(numbers.pow(4).mean()) - 3) < 6 * math.sqrt(96 / count)
    for bound in (0.5, 1.0, 2.0, 3.0):
        share, expected = float((numbers.abs() < bound).double().mean()), math.erf(bound / math.sqrt(2))
        assert abs(share - expected) < 6 * math.sqrt(expected * (1 - expected) / count)


def test_gaussians_of_one_draw_are_not_related_to_each_other():
    numbers = gaussians(200_000, 1.0, seeded())
    half = len(numbers) // 2
    chunk = 1 << 16
    # Neighbours, and the two that one transform gives: in their values and in their sizes.
    for first, second in ((numbers[:-1], numbers[1:]), (numbers[:chunk], numbers[chunk : 2 * chunk])):
        for view in (first, first.square()):
            other = second if view is first else second.square()
            relation = float(torch.corrcoef(torch.stack([view, other]))[0, 1])
            assert abs(relation) < 6 / math.sqrt(half)


def test_one_gaussian_is_the_sum_of_four_over_two():
    numbers = seeded(3).uniforms(8)
    radius = (-2 * (1 - numbers[:4]).log()).sqrt()
    angle = 2 * math.pi * numbers[4:]
    expected = [float((radius * part).sum()) / 2 * 5.0 for part in (angle.cos(), angle.sin())]
    assert gaussians(2, 5.0, seeded(3)).tolist() == pytest.approx(expected, rel=1e-12)


def test_noise_is_added_to_every_number_and_keeps_shape_and_type():
    total = torch.arange(6.0).reshape(2, 3)
    result = noised(total, 0.5, seeded(1))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (total + gaussians(6, 0.5, seeded(1)).reshape(2, 3)).to(torch.float32))
    assert noised(torch.tensor(1.0), 0.5, seeded(1)).shape == ()


def test_without_deviation_nothing_is_drawn():
    total = torch.ones(3)
    assert noised(total, 0.0, None) is total  # type: ignore[arg-type]


def test_a_generator_for_dropout_has_a_seed_of_53_bits_from_the_source():
    first, second = secret_generator(seeded(4)), secret_generator(seeded(4))
    assert first.initial_seed() == second.initial_seed() == int(seeded(4).uniforms(1) * 2**53)
    assert secret_generator(SystemNoise()).initial_seed() != secret_generator(SystemNoise()).initial_seed()
