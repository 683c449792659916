"""The mechanism passes its audit, and fails it as soon as a part of it is broken."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from caravan.config import PrivacyConfig
from caravan.errors import PrivacyError
from caravan.training import mechanism
from caravan.training.accounting import Mechanism, epsilon
from caravan.training.audit import audit_mechanism, audit_training
from caravan.training.one_run import Audit, one_run_lower_bound
from toy_privacy import Spent, private_steps, seeded
from toy_training import EXAMPLES, toy_config, toy_retriever

SIGMA = 1.5  # of one step in which every unit takes part: epsilon 2.75
FEW = 400  # canaries, for what has to be quick: they could show an epsilon of 3.25
USERS = {"unit": "user", "user_column": "user", "examples_per_user": 10}

Sabotage = Callable[[pytest.MonkeyPatch], None]


def audited(backbone, *, seed: int = 0, sigma: float = SIGMA, **options: Any) -> Audit:
    names = ("stage", "steps", "canaries")
    how = {name: options.pop(name) for name in names if name in options}
    config = PrivacyConfig(**{"mode": "dp-sgd", **options})
    return audit_mechanism(backbone, config, sigma, delta=1e-5, seed=seed, source=seeded(1000 + seed), **how)


def remove_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mechanism, "noised", lambda total, std, source: total)


def skip_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mechanism, "clip_weights", lambda norms, clip: torch.ones_like(norms))


def clip_the_batch(patch: pytest.MonkeyPatch) -> None:
    """The mean gradient is cut instead of each one's, and the noise stays as it was."""
    add, write = mechanism._Total.add, mechanism._Total.write

    def unclipped(self: Any, batch: Sequence[int], dropout: Any, *, clip: float, units: Sequence[int]) -> Tensor:
        self.cut_at = clip
        return add(self, batch, dropout, clip=None, units=units)

    def cut_and_write(self: Any, std: float, count: float, private: Any) -> None:
        self.shorten(self.cut_at, count)
        self.sums = {name: total * count for name, total in self.sums.items()}
        write(self, std, count, private)

    patch.setattr(mechanism._Total, "add", unclipped)
    patch.setattr(mechanism._Total, "write", cut_and_write)


def forget_the_clip_in_the_noise(patch: pytest.MonkeyPatch) -> None:
    """The noise has deviation sigma, not sigma times C."""
    write = mechanism._Total.write

    def too_little(self: Any, std: float, count: float, private: Any) -> None:
        write(self, private.sigma, count, private)

    patch.setattr(mechanism._Total, "write", too_little)


def clip_examples_of_a_user_apart(patch: pytest.MonkeyPatch) -> None:
    add = mechanism._Total.add
    patch.setattr(
        mechanism._Total, "add", lambda self, batch, dropout, *, clip, units: add(self, batch, dropout, clip=clip)
    )


SABOTAGES = [
    pytest.param(remove_noise, {}, id="noise removed"),
    pytest.param(skip_clipping, {}, id="clipping skipped"),
    pytest.param(clip_the_batch, {}, id="clipped per batch"),
    pytest.param(forget_the_clip_in_the_noise, {"clip": 8.0}, id="sigma instead of sigma x C"),
]


@pytest.mark.slow
def test_the_honest_mechanism_passes_twenty_of_twenty_and_gives_something_away(backbone):
    audits = [audited(backbone, seed=seed) for seed in range(20)]
    assert all(audit.passed for audit in audits)
    # It is not passed for being blind: every attack proves an epsilon well above 0, by guessing better than chance.
    assert min(audit.lower_bound for audit in audits) > 0.4
    assert all(audit.ceiling > audit.accounted.epsilon for audit in audits)


@pytest.mark.parametrize(("sabotage", "settings"), SABOTAGES)
def test_a_broken_mechanism_fails(backbone, monkeypatch, sabotage, settings):
    assert audited(backbone, canaries=FEW, **settings).passed
    sabotage(monkeypatch)
    assert not audited(backbone, canaries=FEW, **settings).passed


@pytest.mark.slow
@pytest.mark.parametrize(("sabotage", "settings"), SABOTAGES)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"mode": "dp-sgd-adaptive"}, id="adaptive"),
        pytest.param({"steps": 4, "sigma": 2 * SIGMA}, id="four steps"),
        pytest.param(USERS, id="users"),
    ],
)
def test_every_mode_and_unit_passes_whole_and_fails_broken(backbone, monkeypatch, sabotage, settings, kind):
    check_whole_and_broken(backbone, monkeypatch, sabotage, least=0.9, **kind, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("sabotage", "settings"), [each for each in SABOTAGES if each.id != "clipped per batch"])
def test_the_adapter_stage_passes_whole_and_fails_broken(backbone, monkeypatch, sabotage, settings):
    # Not so where the mean gradient is clipped: those of the adapter overlap, and what is left of each is too little.
    check_whole_and_broken(backbone, monkeypatch, sabotage, least=0.1, stage="adapter", canaries=FEW, **settings)


def check_whole_and_broken(
    backbone, monkeypatch: pytest.MonkeyPatch, sabotage: Sabotage, *, least: float, **options: Any
) -> None:
    honest = [audited(backbone, seed=seed, **options) for seed in range(3)]
    assert all(audit.passed for audit in honest)
    assert sum(audit.lower_bound for audit in honest) > least  # the attacks see something
    sabotage(monkeypatch)
    assert not any(audited(backbone, seed=seed, **options).passed for seed in range(3))


def test_clipping_the_examples_of_a_user_apart_fails(backbone, monkeypatch):
    assert audited(backbone, canaries=FEW, **USERS).passed
    clip_examples_of_a_user_apart(monkeypatch)
    assert not audited(backbone, canaries=FEW, **USERS).passed


def test_noise_of_sigma_without_the_clip_is_more_than_enough_for_a_clip_below_one(backbone, monkeypatch):
    # The noise is then 1 / C times what was accounted for: a waste, and no fault that an attack could see.
    forget_the_clip_in_the_noise(monkeypatch)
    assert audited(backbone, canaries=FEW, clip=0.1).lower_bound < 0.1


def test_the_same_seeds_give_the_same_audit(backbone):
    assert audited(backbone, canaries=FEW, seed=3) == audited(backbone, canaries=FEW, seed=3)


def test_the_audit_states_what_is_accounted_and_what_it_could_have_shown(backbone):
    audit = audited(backbone, canaries=FEW)
    # One Gaussian mechanism, sigma 1.5: Phi(0.5 / 1.5 - 1.5 e) - exp(e) Phi(-0.5 / 1.5 - 1.5 e) = 1e-5 at e = 2.754.
    assert audit.accounted.epsilon == pytest.approx(2.754, abs=0.01)
    assert (audit.canaries, audit.guesses) == (FEW, 80)
    assert audit.ceiling == one_run_lower_bound(80, 80, 1e-5, FEW)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"canaries": 100}, r"an audit with 100 canaries shows at most epsilon = 1\.\d+ and could not refute 2\.7"),
        ({"sigma": 0.0}, "could not refute infinity"),
        ({"mode": "paper"}, "promises nothing"),
    ],
)
def test_an_audit_that_could_not_fail_is_refused(backbone, options, says):
    with pytest.raises(PrivacyError, match=says):
        audited(backbone, **options)


def trained_and_audited(backbone, *, sigma: float, clip: float = 1.0, seed: int = 0) -> Audit:
    private = private_steps(sigma=sigma, clip=clip, batch=50, source=seeded(seed))
    config = toy_config(epochs=60, rate=0.02, batch_size=50)
    retriever = toy_retriever(backbone, hidden=256)
    return audit_training(retriever, EXAMPLES, "head", config, private, delta=1e-5, seed=seed, canaries=200)


def test_a_whole_training_passes_and_fails_without_noise_and_clipping(backbone, monkeypatch):
    honest = trained_and_audited(backbone, sigma=15.0)
    assert honest.passed
    assert honest.accounted.epsilon < 1.1
    remove_noise(monkeypatch)
    skip_clipping(monkeypatch)
    assert not trained_and_audited(backbone, sigma=15.0).passed


def test_a_whole_training_is_accounted_for_as_it_is_spent(backbone):
    spent = Spent()
    private = private_steps(sigma=2.0, clip=1.0, batch=16, spend=spent)
    audit = audit_training(
        *(toy_retriever(backbone), EXAMPLES, "head", toy_config(epochs=2), private), delta=1e-5, seed=0, canaries=20
    )
    # None of the 20 canaries beside the examples, or all of them.
    most, least = (
        epsilon([Mechanism(16 / (len(EXAMPLES) + more), 2.0, sum(spent.steps))], 1e-5).epsilon for more in (0, 20)
    )
    assert least < audit.accounted.epsilon < most
