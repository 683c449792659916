"""The commands about privacy print what the accountants and the ledger say, in text and JSON; errors are one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from caravan.data.records import Example
from caravan.training import mechanism
from caravan.training.accounting import Mechanism, epsilon
from caravan.training.ledger import Ledger, identify
from command_line import Workshop, check_refused, listing, run

PLAN = ("privacy", "plan", "--examples", "1000", "--epochs", "2", "--batch", "100")
SPENT = Mechanism(0.1, 2.0, 20)
AUDIT = ("privacy", "audit", "--epsilon", "2", "--canaries", "300")


def only_json(*arguments: object) -> Any:
    outcome = run(*arguments, "--json")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return json.loads(outcome.out)


@pytest.fixture
def ledger(here: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setenv("CARAVAN_LEDGER", str(here / "ledger"))
    opened = Ledger.open(here / "ledger", identify([Example("a", ("d",)), Example("b", ("d",))]), run="first")
    opened.reserve(SPENT, cap=None, delta=1e-5, stage="head")
    return opened


def test_a_plan_is_printed_as_facts_and_advice():
    outcome = run(*PLAN, "--sigma", "2", "--numbers", "10000", "--cap", "6")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    made = only_json(*PLAN, "--sigma", "2", "--numbers", "10000", "--cap", "6")
    assert {"sigma 2", "steps 20", "noise to signal 2", f"runs within cap {made['runs_within_cap']}"} < set(lines)
    assert [line[2:] for line in outcome.out.splitlines() if line.startswith("- ")] == made["advice"]
    assert made["guarantee"]["epsilon"] == epsilon([SPENT], 1_000**-1.1).epsilon
    assert made["mechanism"] == {"sampling": 0.1, "noise_multiplier": 2.0, "steps": 20}


def test_a_plan_for_an_epsilon_gives_noise_and_counts_what_is_trained():
    made = only_json(*PLAN, "--epsilon", "3", "--documents", "77", "--adapter", "core", "--set", "head.hidden=0")
    assert 2.97 < made["guarantee"]["epsilon"] <= 3
    assert made["numbers"] == 77 * 384 + 77 + 1 + 32 * 32
    assert made["noise_to_signal"] == pytest.approx(
        made["mechanism"]["noise_multiplier"] * made["numbers"] ** 0.5 / 100
    )


def test_an_accountant_without_an_answer_says_so():
    assert "no answer" in run(*PLAN, "--sigma", "0.1").out
    assert "infinity" in run(*PLAN, "--sigma", "0").out


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        ((*PLAN,), "give --epsilon", 2),
        ((*PLAN, "--epsilon", "3", "--sigma", "1"), "give --epsilon", 2),
        ((*PLAN, "--sigma", "1", "--numbers", "3", "--documents", "3"), "contradicts --numbers", 2),
        ((*PLAN, "--sigma", "1", "--adapter", "core"), "add --documents", 2),
        ((*PLAN, "--sigma", "1", "--rank", "4"), "add --documents", 2),
        ((*PLAN[:-1], "0", "--sigma", "1"), "--batch", 2),
        ((*PLAN[:-1], "2000", "--sigma", "1"), "batch = 2,000 is more than", 1),
        ((*PLAN, "--sigma", "-1"), "noise_multiplier = -1", 1),
        ((*PLAN, "--sigma", "nan"), "noise_multiplier = nan", 1),
        ((*PLAN, "--epsilon", "0"), "epsilon = 0.0", 1),
        ((*PLAN, "--epsilon", "1", "--delta", "2"), "delta = 2.0", 1),
        ((*PLAN, "--epsilon", "1", "--documents", "3", "--adapter", "wide"), "adapter.kind", 1),
        (("privacy", "audit", "--epsilon", "8"), "could not refute", 1),
        (("privacy", "audit", "--epsilon", "-1"), "epsilon = -1.0", 1),
        (("privacy", "audit", "--delta", "0"), "delta = 0.0", 1),
        (("privacy", "audit", "--set", "privacy.mode=paper"), "promises nothing", 1),
        (("privacy", "audit", "--repeats", "0"), "--repeats", 2),
        (("privacy", "ledger", "--folder", "nowhere"), "nowhere: there is no privacy ledger", 1),
    ],
)
def test_wrong_input_is_told_on_one_line(arguments: tuple[str, ...], says: str, code: int, here: Path):
    check_refused(run(*arguments), says, code=code)
    assert listing(here) == {}


def test_the_ledger_is_shown_with_what_each_data_set_has_spent(ledger: Ledger, here: Path):
    other = Ledger.open(here / "ledger", identify([Example("b", ("d",)), Example("c", ("d",))]))
    other.reserve(Mechanism(0.5, 4.0, 3), cap=None, delta=1e-5)
    first, second = only_json("privacy", "ledger", "--delta", "1e-5")["data_sets"]
    both = epsilon([SPENT, Mechanism(0.5, 4.0, 3)], 1e-5)
    assert first["epsilon"] == second["epsilon"] == both.epsilon
    assert (first["data"], first["unit"], first["units"], first["delta"]) == (ledger.data, "example", 2, 1e-5)
    (entry,) = first["entries"]
    assert entry["mechanism"] == {"sampling": 0.1, "noise_multiplier": 2.0, "steps": 20}
    assert (entry["stage"], entry["run"]) == ("head", "first")
    outcome = run("privacy", "ledger", "--folder", here / "ledger", "--delta", "1e-5")
    assert (outcome.code, outcome.err) == (0, "")
    assert "ledger: 2 data sets\n" in outcome.out
    assert f"\n{ledger.data[:12]}, 2 units (example): {both}\n" in outcome.out
    assert "20 steps  sampling 0.1  sigma 2  head first\n" in outcome.out
    assert "3 steps  sampling 0.5  sigma 4  -\n" in outcome.out


def test_a_ledger_without_a_guarantee_is_shown_too(ledger: Ledger):
    ledger.reserve(Mechanism(0.5, 0.0, 1), cap=None, delta=1e-5)
    assert only_json("privacy", "ledger")["data_sets"][0]["epsilon"] == "infinity"
    assert "epsilon = infinity" in run("privacy", "ledger").out


def test_a_ledger_that_was_changed_is_not_shown(ledger: Ledger, here: Path):
    place = here / "ledger/ledger.jsonl"
    place.write_bytes(place.read_bytes().replace(b'"steps": 20', b'"steps": 10'))
    check_refused(run("privacy", "ledger"), "ledger.jsonl: was changed")


def test_an_audit_is_printed_with_both_bounds(workshop: Workshop):
    outcome = run(*AUDIT, "--repeats", "2", "--set", f"backbone.name={workshop.backbone}", "--set", "privacy.clip=2")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert "mechanism dp-sgd, unit example, clip 2" in lines
    assert "attacks 2, each with 300 canaries and 60 guesses" in lines
    assert "passed 2 of 2" in lines
    (accounted,) = (line for line in lines if line.startswith("accounted"))
    assert accounted.endswith("at delta = 1e-05 (PLD)")


def test_an_audit_that_fails_says_so_by_its_exit_code(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    backbone = ("--set", f"backbone.name={workshop.backbone}")
    honest = only_json(*AUDIT, *backbone)
    assert honest["passed"] is honest["audits"][0]["passed"] is True
    assert honest["audits"][0]["lower_bound"] <= honest["accounted"]["epsilon"] <= 2
    monkeypatch.setattr(mechanism, "noised", lambda total, std, source: total)
    outcome = run(*AUDIT, *backbone, "--json")
    assert (outcome.code, outcome.err) == (1, "")
    broken = json.loads(outcome.out)
    assert broken["passed"] is False
    assert broken["audits"][0]["lower_bound"] > 2
