"""Private training attacked as it is configured and as it runs, with the noise that protects real queries."""

import secrets
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any

from caravan.config import Config, PrivacyConfig
from caravan.model.backbone import load_backbone
from caravan.training.accounting import Guarantee, noise_for
from caravan.training.audit import audit_mechanism
from caravan.training.features import FeatureStore
from caravan.training.one_run import Audit
from caravan.training.progress import Report, prefixed

_WRONG = 0.05  # chance that one or more of all attacks refute a mechanism that is sound


@dataclass(frozen=True)
class Verdict:
    """What repeated attacks on one mechanism showed.

    Attributes:
        privacy: mode, clip and unit that were attacked.
        sigma: noise multiplier of the step.
        audits: one a repeat, each of one step that all canaries take part in.
    """

    privacy: PrivacyConfig
    sigma: float
    audits: tuple[Audit, ...]

    @property
    def accounted(self) -> Guarantee:
        """What the accountant allows."""
        return self.audits[0].accounted

    @property
    def passed(self) -> int:
        """How many attacks stayed below that."""
        return sum(audit.passed for audit in self.audits)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        first = self.audits[0]
        return {
            **{"mode": self.privacy.mode, "unit": self.privacy.unit, "clip": self.privacy.clip, "sigma": self.sigma},
            "accounted": asdict(self.accounted),
            **{"confidence": first.confidence, "canaries": first.canaries, "guesses": first.guesses},
            "ceiling": first.ceiling,
            "audits": [
                {"correct": audit.correct, "lower_bound": audit.lower_bound, "passed": audit.passed}
                for audit in self.audits
            ],
            "passed": self.passed == len(self.audits),
        }


def attack(
    config: Config, target_epsilon: float, *, delta: float, repeats: int, canaries: int, report: Report | None = None
) -> Verdict:
    """Audit one step of the configured private training, with the noise that its accountant gives for an epsilon.

    All repeats together refute a sound mechanism with a chance of at most 0.05.

    Args:
        config: its backbone encodes, its section on privacy is audited; mode "none" there stands for "dp-sgd".
        target_epsilon: of the step.
        delta: of both bounds.
        repeats: how many attacks, each with coins, canaries and noise of its own.
        canaries: of each attack.
        report: called as the work goes on.

    Raises:
        PrivacyError: the numbers are out of range, the audit could not fail, or the extra "private" is not installed.
        BackboneError: the backbone cannot be loaded.
    """
    privacy = replace(config.privacy, mode="dp-sgd") if config.privacy.mode == "none" else config.privacy
    sigma = noise_for(target_epsilon, delta, [(1.0, 1)])
    backbone = load_backbone(config.backbone, seed=config.seed)
    audits = []
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as folder:  # what is encoded to train on is encoded once more to attack
            audit = audit_mechanism(
                backbone,
                privacy,
                sigma,
                delta=delta,
                seed=secrets.randbits(48),
                canaries=canaries,
                confidence=1 - _WRONG / repeats,
                store=FeatureStore(folder),
                report=prefixed(report, f"attack {number + 1} of {repeats}: "),
            )
        audits.append(audit)
    return Verdict(privacy, sigma, tuple(audits))
