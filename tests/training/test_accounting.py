"""Accountants give known values, agree with each other, bound closed forms from above and never fall."""

import logging
import math
import subprocess
import sys
from importlib import util
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.errors import PrivacyError
from caravan.training import accounting
from caravan.training.accounting import Guarantee, Mechanism, epsilon, epsilons, in_figures, noise_for, paper_guarantee

TEXTBOOK = Mechanism(sampling=256 / 60_000, noise_multiplier=1.1, steps=14_062)  # 60 epochs; 60,000 / 256 a pass
SMS_SPAM = 32 / 4_472, 1_398  # sampling and steps of 10 epochs
TEN = [
    Mechanism(256 / 60_000, 1.1, 14_062),
    Mechanism(256 / 60_000, 1.3, 3_516),
    Mechanism(512 / 4_472, 1.5, 90),
    Mechanism(512 / 4_472, 0.77, 270),
    Mechanism(32 / 4_472, 0.5, 1_398),
    Mechanism(32 / 4_472, 1.0, 1_398),
    Mechanism(0.01, 2.0, 100_000),
    Mechanism(0.001, 0.8, 20_000),
    Mechanism(1.0, 2.0, 10),
    Mechanism(0.5, 4.0, 50),
]


def delta_of_gaussian(value: float, noise: float) -> float:
    """Balle and Wang (arXiv:1805.06530), theorem 8: the exact delta of one Gaussian mechanism of sensitivity 1."""

    def below(z: float) -> float:
        return math.erfc(-z / math.sqrt(2)) / 2

    return below(0.5 / noise - value * noise) - math.exp(value) * below(-0.5 / noise - value * noise)


def test_the_textbook_case_has_the_published_values():
    found = epsilons([TEXTBOOK], 1e-5)
    assert found == pytest.approx({"PLD": 2.38, "RDP": 2.60, "PRV": 2.39}, rel=0.02)
    best = epsilon([TEXTBOOK], 1e-5)
    assert (best.epsilon, best.accountant) == (found["PLD"], "PLD")


def test_a_second_known_case_has_its_known_values():
    found = epsilons([Mechanism(256 / 60_000, 1.3, 3_516)], 1e-5)
    assert found == pytest.approx({"PLD": 0.86, "RDP": 0.95, "PRV": 0.87}, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", TEN, ids=str)
def test_two_independent_libraries_agree_to_three_percent(mechanism: Mechanism):
    found = epsilons([mechanism], 1e-5)
    assert found["PLD"] == pytest.approx(found["PRV"], rel=0.03)
    assert found["PLD"] <= found["RDP"]


def test_two_independent_libraries_agree_on_a_mixed_history():
    history = [Mechanism(0.1, 1.5, 100), Mechanism(0.02, 1.0, 300), Mechanism(1.0, 8.0, 3)]
    found = epsilons(history, 1e-5)
    assert found["PLD"] == pytest.approx(found["PRV"], rel=0.01)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (3.0, 4), (20.0, 100), (0.5, 2)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9])
def test_without_sampling_the_bound_is_just_above_the_closed_form(noise: float, steps: int, delta: float):
    best = epsilon([Mechanism(1.0, noise, steps)], delta)
    single = noise / math.sqrt(steps)  # T steps of sigma are one of sigma / sqrt(T)
    assert delta_of_gaussian(best.epsilon, single) <= delta
    assert delta_of_gaussian(best.epsilon * 0.998, single) > delta


def test_a_sampled_step_is_bounded_just_above_its_exact_value():
    # One step, one unit more or less: P = (1 - q) N(0, 1) + q N(1, 1) against Q = N(0, 1), cut where P = e^epsilon Q.
    sampling, delta = 0.3, 1e-4
    best = epsilon([Mechanism(sampling, 1.0, 1)], delta).epsilon

    def exact(value: float) -> float:
        cut = 0.5 + math.log((math.exp(value) - 1 + sampling) / sampling)
        tail, shifted = math.erfc(cut / math.sqrt(2)) / 2, math.erfc((cut - 1) / math.sqrt(2)) / 2
        return (1 - sampling) * tail + sampling * shifted - math.exp(value) * tail

    assert exact(best) <= delta
    assert exact(best * 0.998) > delta


def test_the_order_of_a_history_and_how_it_is_cut_change_nothing():
    whole = epsilon([Mechanism(0.1, 1.5, 100), Mechanism(0.02, 1.0, 300)], 1e-5)
    cut = [Mechanism(0.02, 1.0, 299), Mechanism(0.1, 1.5, 40), Mechanism(0.02, 1.0, 1), Mechanism(0.1, 1.5, 60)]
    assert epsilon(cut, 1e-5) == whole


def test_without_noise_nothing_is_guaranteed_and_without_steps_nothing_is_spent():
    assert epsilon([Mechanism(0.1, 1.0, 10), Mechanism(0.1, 0.0, 1)], 1e-5) == Guarantee(math.inf, 1e-5, "none")
    assert set(epsilons([Mechanism(0.1, 0.0, 1)], 1e-5).values()) == {math.inf}
    assert epsilon([], 1e-5) == Guarantee(0.0, 1e-5, "none")
    assert set(epsilons([], 1e-5).values()) == {0.0}


def test_hardly_any_noise_is_a_huge_epsilon_and_very_much_noise_a_tiny_one():
    assert epsilon([Mechanism(0.01, 0.001, 100)], 1e-5).epsilon > 1e5
    assert epsilon([Mechanism(0.01, 1e-200, 1)], 1e-5) == Guarantee(math.inf, 1e-5, "none")
    assert epsilon([Mechanism(0.01, 1e5, 100)], 1e-5).epsilon < 0.001


def test_a_delta_that_a_fourier_transform_cannot_resolve_is_left_to_the_other_accountant():
    found = epsilons([Mechanism(1.0, 2.0, 10)], 1e-12)
    assert found["PLD"] is None
    assert epsilon([Mechanism(1.0, 2.0, 10)], 1e-12) == Guarantee(found["RDP"], 1e-12, "RDP")


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.6, 1.0, 4.0]), st.integers(1, 400)),
        min_size=2,
        max_size=4,
    )
)
@settings(max_examples=10, deadline=None)
def test_epsilon_never_falls_as_steps_are_added(history: list[tuple[float, float, int]]):
    mechanisms = [Mechanism(*each) for each in history]
    values = [epsilon(mechanisms[:count], 1e-5).epsilon for count in range(len(mechanisms) + 1)]
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(values))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2_000, 40_000])
def test_epsilon_does_not_fall_where_the_grid_becomes_coarser(steps: int):
    # Around an epsilon of 30 and of 300 by RDP, where the grid changes.
    values = [epsilon([Mechanism(0.05, 1.0, count)], 1e-5).epsilon for count in range(steps, 3 * steps, steps // 4)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("target", "plan", "spent"),
    [
        (3.0, [(512 / 4_472, 87)], []),
        (1.0, [(0.01, 1_000)], [Mechanism(0.2, 5.0, 10)]),
        pytest.param(8.0, [(0.1, 100), (0.5, 4)], [], marks=pytest.mark.slow),
        pytest.param(100.0, [(0.01, 1_000)], [], marks=pytest.mark.slow),
    ],
)
def test_the_noise_for_a_target_is_the_least_that_keeps_within_it(target, plan, spent):
    noise = noise_for(target, 1e-5, plan, spent)
    planned = [[Mechanism(sampling, part * noise, steps) for sampling, steps in plan] for part in (1, 0.998)]
    assert epsilon([*spent, *planned[0]], 1e-5).epsilon <= target
    assert epsilon([*spent, *planned[1]], 1e-5).epsilon > target


def test_a_target_that_is_spent_or_nearly_so_is_refused():
    spent = [Mechanism(0.2, 1.0, 50)]
    value = epsilon(spent, 1e-5).epsilon
    with pytest.raises(PrivacyError, match="is spent"):
        noise_for(value, 1e-5, [(0.1, 10)], spent)
    with pytest.raises(PrivacyError, match="too little"):
        noise_for(value * (1 + 1e-9), 1e-5, [(0.1, 10)], spent)


@pytest.mark.parametrize(("noise", "by_rdp", "by_pld"), [(0.1, 1_313, 1_189), (0.5, 14, 11.7)])
def test_the_paper_s_noise_is_worth_little_even_where_it_is_accounted(noise, by_rdp, by_pld):
    mechanism = Mechanism(SMS_SPAM[0], noise, SMS_SPAM[1])
    assert epsilons([mechanism], 1e-5)["RDP"] == pytest.approx(by_rdp, rel=0.01)
    assert epsilon([mechanism], 1e-5).epsilon == pytest.approx(by_pld, rel=0.01)


def test_of_the_paper_s_mode_nothing_can_be_proved_and_each_reason_is_named():
    mechanism = Mechanism(SMS_SPAM[0], 0.5, SMS_SPAM[1])
    all_faults = paper_guarantee(mechanism, 1e-5, noise_free_steps=838)
    assert all_faults.proved == Guarantee(math.inf, 1e-5, "none")
    assert all_faults.accounted == epsilon([mechanism], 1e-5)
    assert len(all_faults.reasons) == 4
    for word in ("838 steps of the warm-up", "batch is clipped", "quantile", "Poisson", "11.68 at delta = 1e-05 (PLD)"):
        assert word in str(all_faults)
    free = {"clipping": "example", "private_quantile": False, "poisson": True}
    for fault in ({"noise_free_steps": 1}, {"clipping": "batch"}, {"private_quantile": True}, {"poisson": False}):
        assert len(paper_guarantee(mechanism, 1e-5, **{**free, **fault}).reasons) == 1
    none = paper_guarantee(mechanism, 1e-5, **free)
    assert none.proved == none.accounted
    assert str(none) == "Proved: epsilon = 11.68 at delta = 1e-05 (PLD)."


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2.38161, "2.382"), (3, "3.000"), (1189.01, "1,190"), (0.0123401, "0.01235"), (0, "0"), (math.inf, "infinity")],
)
def test_an_epsilon_is_rounded_up(value: float, shown: str):
    assert in_figures(value) == shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0.0, 1.0, 1), "sampling = 0.0"),
        ((1.5, 1.0, 1), "sampling = 1.5"),
        ((math.nan, 1.0, 1), "sampling = nan"),
        ((0.5, -1.0, 1), "noise_multiplier = -1.0"),
        ((0.5, math.inf, 1), "noise_multiplier = inf"),
        ((0.5, math.nan, 1), "noise_multiplier = nan"),
        ((0.5, 1.0, 0), "steps = 0"),
        ((0.5, 1.0, 1.5), "steps = 1.5"),
    ],
)
def test_a_mechanism_out_of_range_is_refused(arguments, says):
    with pytest.raises(PrivacyError, match=says):
        Mechanism(*arguments)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_a_delta_out_of_range_is_refused(delta):
    with pytest.raises(PrivacyError, match="delta"):
        epsilon([], delta)
    with pytest.raises(PrivacyError, match="delta"):
        noise_for(1.0, delta, [(0.1, 1)])


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(PrivacyError, match="epsilon"):
        noise_for(target, 1e-5, [(0.1, 1)])


@pytest.mark.parametrize("missing", ["dp_accounting", "opacus"])
def test_without_the_extra_the_remedy_is_named(missing, monkeypatch):
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest))
    accounting._guarantee.cache_clear()
    with pytest.raises(PrivacyError, match=rf"{missing} is missing; pip install 'caravan\[private\]'"):
        epsilons([Mechanism(0.5, 1.0, 1)], 1e-5)


def test_the_libraries_say_nothing_of_their_own_and_their_logger_is_left_as_it_was(caplog, capfd):
    logger = logging.getLogger("absl")
    level = logger.level
    epsilon([Mechanism(512 / 4_472, 0.771, 270)], 1e-5)  # orders below 2 do not converge
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")
    assert logger.level == level


def test_importing_the_module_imports_no_accountant():
    libraries = "{'dp_accounting', 'opacus', 'scipy'}"
    code = f"import sys, caravan.training.accounting; print([*{libraries} & set(sys.modules)])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
