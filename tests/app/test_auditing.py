"""The audit of a configuration attacks what is configured, and all its repeats together are seldom wrong."""

import pytest

from caravan.app.auditing import attack
from caravan.config import Config, changed, config_from_dict
from command_line import Workshop


def settings(workshop: Workshop, **privacy: object) -> Config:
    changes = {"backbone.name": str(workshop.backbone), **{f"privacy.{name}": it for name, it in privacy.items()}}
    return config_from_dict(changed({}, changes), source="a test")


def test_without_a_mode_the_usual_one_is_attacked_with_the_noise_for_the_epsilon(workshop: Workshop):
    verdict = attack(settings(workshop), 2.0, delta=1e-5, repeats=2, canaries=300)
    assert (verdict.privacy.mode, verdict.passed, len(verdict.audits)) == ("dp-sgd", 2, 2)
    assert 1.99 < verdict.accounted.epsilon <= 2
    assert all(audit.confidence == pytest.approx(0.975) for audit in verdict.audits)


def test_the_configured_mode_and_unit_are_attacked(workshop: Workshop):
    config = settings(workshop, mode="dp-sgd-adaptive", unit="user", user_column="user", examples_per_user=2, clip=0.5)
    values = attack(config, 2.0, delta=1e-5, repeats=1, canaries=300).to_dict()
    assert (values["mode"], values["unit"], values["clip"]) == ("dp-sgd-adaptive", "user", 0.5)
    assert (values["canaries"], values["guesses"], values["confidence"]) == (300, 60, 0.95)
    assert values["passed"] is values["audits"][0]["passed"] is True
    assert values["audits"][0]["lower_bound"] <= values["accounted"]["epsilon"] < values["ceiling"]
