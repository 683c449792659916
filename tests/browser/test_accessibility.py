"""axe-core finds nothing serious on any page, and nothing is wider than the window: light and dark, wide and narrow."""

from pathlib import Path
from typing import Any

import pytest

from browsing import LOOKS, WIDTHS, Person, visiting

pytestmark = pytest.mark.slow


def search(person: Person) -> None:
    page = person.goes_to("search", "?q=refund")
    page.locator(".result .title").first.click()
    page.locator(".result [aria-expanded=true]").wait_for()


def start(person: Person) -> None:
    person.goes_to("search").locator(".examples a").first.wait_for()


def compare(person: Person) -> None:
    page = person.goes_to("compare", "?q=refund")
    page.locator('[data-column="bm25"] li').first.wait_for()
    page.locator('[data-column="ours"] li').first.focus()


def ask(person: Person) -> None:
    page = person.goes_to("ask", "?q=how+long+is+the+warranty")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".confidence").wait_for(timeout=120_000)


def training(person: Person) -> None:
    person.goes_to("training").locator(".chart svg").first.wait_for()


def documents(person: Person) -> None:
    person.goes_to("documents").locator(".document").first.wait_for()


def key_dialog(person: Person) -> None:
    documents(person)
    person.page.get_by_role("button", name="API key").click()
    person.page.locator("#key-dialog").wait_for()


def trouble(person: Person) -> None:
    person.expected += ("429",)
    person.page.route("**/search", lambda route: route.fulfill(status=429, headers={"retry-after": "9"}, json={}))
    person.goes_to("search", "?q=refund").locator(".notice").wait_for()


STATES = (start, search, compare, ask, training, documents, key_dialog, trouble)


@pytest.fixture(scope="module")
def axe() -> str:
    package = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    return Path(package.__file__).with_name("axe.min.js").read_text(encoding="utf-8")


def issues(person: Person, axe: str) -> list[tuple[Any, ...]]:
    """What axe-core finds on the page as it is shown, the least of it too."""
    person.page.evaluate(axe)
    found = person.page.evaluate("axe.run()")
    assert len(found["passes"]) > 15  # it has looked
    return [
        (issue["impact"], issue["id"], node["html"][:200], node["failureSummary"])
        for issue in found["violations"]
        for node in issue["nodes"]
    ]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_axe_finds_nothing(chromium, at_helpdesk: str, axe: str, state, width: int, look: str) -> None:
    with visiting(chromium, at_helpdesk, width=width, look=look) as person:
        state(person)
        assert issues(person, axe) == []
        assert person.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_axe_sees_what_is_wrong(chromium, at_helpdesk: str, axe: str) -> None:
    with visiting(chromium, at_helpdesk) as person:
        documents(person)
        person.page.evaluate("document.querySelector('label[for=documents-filter]').remove()")
        assert [issue[:2] for issue in issues(person, axe)] == [("critical", "label")]
