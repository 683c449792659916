"""What a person sees when the service refuses, is busy, or is gone: keys, retries, a way on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from browsing import hosted, visiting
from served import KEYS, READ, WRITE, make

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def locked(small: Path) -> Iterator[str]:
    """A service that wants a key."""
    with hosted(make(small, keys=KEYS)) as address:
        yield address


class TestKeys:
    def test_a_key_is_asked_for_a_wrong_one_is_told_and_the_right_one_is_kept_in_this_tab_only(
        self, chromium, locked: str
    ) -> None:
        with visiting(chromium, locked) as person:
            person.expected += ("401",)
            page = person.goes_to("search", "?q=refund")
            dialog = page.locator("#key-dialog")
            dialog.get_by_text("This service asks for a key.").wait_for()
            page.keyboard.type("no-such-key-that-is-known")
            page.keyboard.press("Enter")
            dialog.get_by_text("the key is not known; give one that is.").wait_for()
            page.locator("#key-box").fill(READ)
            page.get_by_role("button", name="Use this key").click()
            person.sees(".result", 4)
            assert page.evaluate("Object.values(sessionStorage)") == [READ]
            assert READ not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
            page.reload()
            person.sees(".result", 4)
            assert not dialog.is_visible()

    def test_who_gives_no_key_is_told_and_can_try_again(self, chromium, locked: str) -> None:
        with visiting(chromium, locked) as person:
            person.expected += ("401",)
            page = person.goes_to("search", "?q=refund")
            page.locator("#key-dialog").get_by_role("button", name="Cancel").click()
            page.get_by_text("Without a key the service does not answer.").first.wait_for()
            page.get_by_role("button", name="Try again").click()
            page.locator("#key-box").fill(READ)
            page.keyboard.press("Enter")
            person.sees(".result", 4)

    def test_a_read_key_may_look_and_a_write_key_may_change(self, chromium, locked: str) -> None:
        with visiting(chromium, locked) as person:
            person.expected += ("401",)
            page = person.goes_to("documents")
            page.locator("#key-box").fill(READ)
            page.keyboard.press("Enter")
            person.sees(".document", 4)
            add = page.get_by_role("button", name="Add a document")
            assert add.is_disabled()
            assert page.get_by_role("button", name="Edit parcel").is_disabled()
            reason = page.get_by_role("button", name="Edit parcel").get_attribute("aria-describedby")
            assert "needs a write key" in page.locator(f"#{reason}").inner_text()
            page.get_by_role("button", name="API key").click()
            page.locator("#key-box").fill(WRITE)
            page.keyboard.press("Enter")
            page.locator("[data-part=add]:enabled").wait_for()
            page.get_by_role("button", name="API key").click()
            page.get_by_role("button", name="Forget the key").click()
            page.locator("#key-dialog").get_by_text("This service asks for a key.").wait_for()
            assert page.evaluate("sessionStorage.length") == 0


class TestBusy:
    @pytest.mark.parametrize(("status", "words"), [(429, "Many people are asking"), (503, "not ready for this yet")])
    def test_it_says_so_kindly_and_tries_again_by_itself(self, chromium, at_small: str, status: int, words) -> None:
        with visiting(chromium, at_small) as person:
            person.expected += (str(status),)
            left = [1]

            def answer(route) -> None:
                if left:
                    left.pop()
                    error = {"error": "512 texts wait", "error_type": "overloaded"}
                    route.fulfill(status=status, headers={"retry-after": "2"}, json=error)
                else:
                    route.continue_()

            person.page.route("**/search", answer)
            page = person.goes_to("search", "?q=refund")
            notice = page.locator(".notice", has_text=words)
            notice.get_by_text("Trying again in 2 s").wait_for()
            assert "512 texts wait" in notice.inner_text()
            person.sees(".result", 4)
            assert not notice.is_visible()

    def test_a_refusal_is_shown_in_the_words_of_the_service(self, chromium, at_small: str) -> None:
        with visiting(chromium, at_small) as person:
            person.expected += ("413",)
            page = person.goes_to("search")
            page.locator("#search-box").fill("a" * 20_001)
            page.get_by_text("A text of 20,001 characters, at most 20,000 are taken; cut it.").wait_for()


def test_an_answer_that_broke_off_is_no_answer(chromium, at_small: str) -> None:
    with visiting(chromium, at_small) as person:
        pieces = 'event: piece\ndata: {"text": "Half of", "afresh": false}\n\n: a sign of life\n\n'
        person.page.route("**/ask", lambda route: route.fulfill(content_type="text/event-stream", body=pieces))
        page = person.goes_to("ask", "?q=refund")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator(".notice", has_text="The answer broke off.").wait_for()
        assert page.locator(".answer").count() == 0
        page.unroute("**/ask")
        page.get_by_role("button", name="Try again").click()
        page.locator(".confidence").wait_for()


def test_a_service_that_is_gone_is_looked_for_until_it_is_back(chromium, at_small: str) -> None:
    with visiting(chromium, at_small) as person:
        person.expected += ("ERR_INTERNET_DISCONNECTED",)
        page = person.goes_to("search", "?q=refund")
        person.sees(".result", 4)
        page.context.set_offline(True)
        page.locator("#search-box").fill("parcel")
        page.get_by_text("This page looks for it and goes on when it is back").wait_for()
        page.context.set_offline(False)
        person.sees(".result", 4)
        assert not page.locator("#connection").is_visible()


def test_the_theme_is_chosen_and_kept(chromium, at_small: str) -> None:
    with visiting(chromium, at_small, look="light") as person:
        page = person.goes_to("search")
        paper = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(paper)
        button = page.get_by_role("button", name="Theme")
        assert button.inner_text() == "Theme: system"
        button.click()
        assert page.evaluate(paper) == light
        button.click()
        assert button.inner_text() == "Theme: dark"
        dark = page.evaluate(paper)
        assert dark != light
        page.reload()
        assert page.evaluate(paper) == dark
