import pytest

from caravan.config import PrivacyConfig
from caravan.errors import PrivacyError
from caravan.model.head import OutputAdapterHead
from caravan.training.noise import SystemNoise
from caravan.training.private import PrivateSteps, sum_noise
from caravan.training.trainer import fit
from toy_privacy import Spent, private_steps
from toy_training import EXAMPLES, toy_config, toy_retriever


def test_noise_comes_from_the_system_unless_a_test_says_otherwise():
    assert isinstance(PrivateSteps(PrivacyConfig(mode="dp-sgd"), 1.0, Spent()).source, SystemNoise)


def test_without_a_mode_there_are_no_private_steps():
    with pytest.raises(PrivacyError, match='"none" has no private steps'):
        PrivateSteps(PrivacyConfig(), 1.0, Spent())


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        (
            {"class_weights": "sqrt"},
            {},
            r'class_weights = "sqrt" counts the queries of each document; set it to "none"',
        ),
        ({"patience": 2}, {}, "patience = 2 chooses an epoch by validation queries; set it to 0"),
        ({}, {"mode": "paper", "unit": "user", "user_column": "user"}, "knows no users"),
        ({}, {"unit": "user", "user_column": "user"}, 'q0 has no value in the column "user"'),
        ({}, {"mode": "dp-sgd-adaptive", "batch": 8}, "at sigma = 1 needs more than 10 units a step, got 8"),
    ],
)
def test_a_setting_that_tells_more_is_refused_before_anything_is_spent(backbone, changes, settings, says):
    spent = Spent()
    privacy = private_steps(sigma=1.0, spend=spent, **settings)
    with pytest.raises(PrivacyError, match=says):
        fit(toy_retriever(backbone), EXAMPLES, "head", toy_config(**changes), seed=0, privacy=privacy)
    assert spent.steps == []


def test_passages_among_the_queries_are_refused(backbone):
    with pytest.raises(PrivacyError, match="passages are public: train on them first"):
        fit(
            toy_retriever(backbone),
            EXAMPLES,
            "head",
            toy_config(),
            seed=0,
            passages=EXAMPLES[:2],
            privacy=private_steps(),
        )


def test_another_head_is_refused(backbone):
    retriever = toy_retriever(backbone)
    retriever.head = OutputAdapterHead(retriever.head.rows, retriever.head_config)
    with pytest.raises(PrivacyError, match="OutputAdapterHead cannot be trained privately"):
        fit(retriever, EXAMPLES, "head", toy_config(), seed=0, privacy=private_steps())


def test_stopping_early_by_public_validation_is_allowed(backbone):
    retriever, config = toy_retriever(backbone), toy_config(epochs=2, patience=1)
    privacy = private_steps(public_validation=True)
    history = fit(retriever, EXAMPLES, "head", config, seed=0, privacy=privacy, validation=EXAMPLES[:9])
    assert all(record.validation_recall is not None for record in history)


def test_the_pair_of_sum_and_count_costs_what_sigma_alone_does():
    # By hand: a count with deviation 100 / 20 = 5, to which a unit adds ±1/2, has the noise multiplier 10.
    assert sum_noise(1.0, 100) == pytest.approx((1 - 0.01) ** -0.5)
    assert sum_noise(1.0, 100) ** -2 + 10**-2 == pytest.approx(1.0)
    assert sum_noise(0.0, 1) == 0.0


def test_a_count_that_costs_it_all_is_refused():
    with pytest.raises(PrivacyError, match=r"needs more than 20 units a step, got 20; raise privacy\.batch"):
        sum_noise(2.0, 20)
    assert sum_noise(2.0, 20.1) > 2.0


def test_what_a_snapshot_keeps_is_taken_up_again():
    privacy = private_steps(mode="paper")
    privacy.clip = 0.25
    privacy.norms.extend([1.0, 2.0])
    other = private_steps(mode="paper")
    other.restore(privacy.state())
    assert (other.clip, list(other.norms)) == (0.25, [1.0, 2.0])
