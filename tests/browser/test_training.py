"""The page Training beside real trainings in other processes: it follows them live and tells what they promise."""

import re
import subprocess
from pathlib import Path

import pytest

from browsing import program_serving, visiting
from command_line import start_program

pytestmark = pytest.mark.slow
QUICK = ("training.mode=head", "evaluation.baselines=false", "evaluation.bootstrap=20")


def training(out: Path, *settings: str) -> subprocess.Popen[bytes]:
    options = [word for setting in (*QUICK, *settings) for word in ("--set", setting)]
    return start_program("train", "helpdesk", "--out", str(out), *options, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("settings", "charts", "word"),
    [
        (("training.head.epochs=12",), ["Loss", "Recall@1"], "nothing, it is trained on one machine"),
        (
            ("training.head.epochs=4", "federation.clients=2", "federation.rounds=4"),
            ["Loss", "Recall@1", "Sent"],
            r"[1-9][\d.]* [kM]B up, [1-9][\d.]* [kM]B down",
        ),
    ],
    ids=["central", "federated"],
)
def test_a_running_training_is_followed_to_its_end(
    chromium, helpdesk: Path, tmp_path: Path, settings: tuple[str, ...], charts: list[str], word: str
) -> None:
    out = tmp_path / "next"
    with program_serving(helpdesk, "--training", str(out)) as address, visiting(chromium, address) as person:
        page = person.goes_to("training")
        page.set_default_timeout(180_000)
        status = person.part("training", "status")
        status.get_by_text("There is no training to follow").wait_for()
        page.evaluate("window.same = true")
        with training(out, *settings) as process:
            try:
                status.get_by_text("Running: next").wait_for()
                rows = page.locator(".numbers tbody tr")
                rows.nth(1).wait_for()
                seen = rows.count()
                rows.nth(seen).wait_for()  # one more, without a reload
                assert page.locator(".chart").first.is_visible()
                status.get_by_text("Finished: next").wait_for()
                assert process.wait(120) == 0
            finally:
                process.kill()
        assert page.evaluate("window.same")
        page.get_by_role("heading", name="On test queries").wait_for()
        assert page.locator(".chart figcaption strong").all_inner_texts() == charts
        about = page.locator(".about-training").inner_text()
        assert "Trained without differential privacy" in about
        assert re.search(word, about)
        for chart in page.locator(".chart svg").all():
            assert "The table below has all numbers" in chart.get_attribute("aria-label")
        assert page.locator(".numbers thead").first.inner_text().split()[:3] == ["Stage", "Step", "Loss"]
