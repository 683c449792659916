"""Every page as a person uses it, against the real `caravan serve` on a retriever that knows the help desk."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from browsing import program_serving, visiting

pytestmark = pytest.mark.slow
BIRD = "my bird went dark mid ride"
FOLDING = {
    "id": "folding-bikes",
    "title": "Folding bikes on trains",
    "text": "A folded bike travels free of charge as hand luggage on every regional train.",
    "metadata": "topic: travel\nsince: 2026",
}


@pytest.fixture
def own(helpdesk: Path, tmp_path: Path) -> Iterator[str]:
    """A service that this machine may change."""
    folder = Path(shutil.copytree(helpdesk, tmp_path / "own"))
    with program_serving(folder, "--local-changes") as address:
        yield address


class TestSearch:
    def test_documents_come_while_one_types_and_the_last_word_counts(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("search")
            (result,) = page.request.post(f"{at_helpdesk}/search", data={"query": BIRD}).json()["results"]
            wanted = [hit["doc_id"] for hit in result["hits"]]
            person.types("#search-box", BIRD, delay=60)
            page.wait_for_url(lambda url: url.endswith("#/search?q=my+bird+went+dark+mid+ride"))
            for rank, doc_id in enumerate(wanted):
                page.locator(f'.result:nth-child({rank + 1})[data-document="{doc_id}"]').wait_for()
            assert re.fullmatch(r"10 documents of 107, in \d+ ms", person.part("search", "status").inner_text())
            page.reload()
            assert page.locator("#search-box").input_value() == BIRD
            page.locator(".result").first.wait_for()

    def test_an_early_answer_that_comes_late_is_not_shown(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("search")
            held = []

            def answer(route) -> None:
                if json.loads(route.request.post_data)["query"] == "refund":
                    held.append(route)
                else:
                    route.continue_()

            page.route("**/search", answer)
            with page.expect_request("**/search"):
                page.locator("#search-box").fill("refund")
            page.locator("#search-box").fill("flat tyre")
            page.locator(".result").first.wait_for()
            shown = page.locator(".result .title").all_inner_texts()
            (late,) = held
            late.continue_()
            page.wait_for_timeout(500)
            assert page.locator(".result .title").all_inner_texts() == shown

    def test_with_the_keyboard_alone(self, chromium, own: str) -> None:
        with visiting(chromium, own) as person:
            page = person.goes_to("search")
            page.locator(".examples a").first.wait_for()
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.className") == "skip"
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.id") == "main"
            page.keyboard.press("/")
            page.keyboard.type(BIRD)
            page.locator(".result").nth(9).wait_for()
            page.keyboard.press("ArrowDown")
            page.keyboard.press("ArrowDown")
            focused = page.locator(".result").nth(1)
            assert focused.locator(".title").evaluate("node => node === document.activeElement")
            short = focused.locator(".text").inner_text()
            page.keyboard.press("Enter")
            assert focused.locator(".title").get_attribute("aria-expanded") == "true"
            assert len(focused.locator(".text").inner_text()) > len(short)
            page.keyboard.press("r")
            focused.locator(".mark.good[aria-pressed=true]").wait_for()
            page.keyboard.press("ArrowUp")
            page.keyboard.press("ArrowUp")
            assert page.evaluate("document.activeElement.id") == "search-box"

    def test_more_are_shown_when_asked_for(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("search", "?q=refund")
            page.get_by_role("button", name="Show more").click()
            page.locator(".result").nth(19).wait_for()
            assert page.locator(".result").nth(10).locator(".title").evaluate("node => node === document.activeElement")

    def test_without_a_query_it_says_what_is_served_and_gives_examples(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("search")
            words = page.locator(".examples a").nth(2).inner_text()
            assert page.locator(".facts").inner_text().splitlines()[:4] == ["Retriever", "helpdesk", "Documents", "107"]
            page.locator(".examples a").nth(2).click()
            page.locator(".result").first.wait_for()
            assert page.locator("#search-box").input_value() == words


class TestMarks:
    def test_a_mark_is_kept_and_can_be_taken_back(self, chromium, own: str) -> None:
        with visiting(chromium, own) as person:
            page = person.goes_to("search", "?q=refund")
            first, second = page.locator(".result").nth(0), page.locator(".result").nth(1)
            first.get_by_role("button", name="Right").click()
            second.get_by_role("button", name="Wrong").click()
            page.locator("#toast", has_text="marked wrong").wait_for()
            page.reload()
            first.locator(".mark.good[aria-pressed=true]").wait_for()
            second.locator(".mark.bad[aria-pressed=true]").wait_for()
            second.get_by_role("button", name="Wrong").click()
            page.locator("#toast", has_text="not marked any more").wait_for()
            page.get_by_role("button", name="Undo").click()
            second.locator(".mark.bad[aria-pressed=true]").wait_for()
            person.goes_to("training")
            marked = person.part("training", "marks")
            marked.get_by_text("2 results marked so far").wait_for()
            marked.get_by_role("button", name="Take back").first.click()
            marked.get_by_text("1 result marked so far").wait_for()

    def test_who_may_not_change_may_not_mark_and_reads_why(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("search", "?q=refund")
            assert page.locator(".result .mark").first.is_disabled()
            assert "needs a write key" in person.part("search", "reason").inner_text()


class TestCompare:
    def test_three_rankings_stand_side_by_side_and_say_what_moved(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("compare")
            person.types("#compare-box", BIRD)
            page.locator('[data-column="bm25"] li').nth(9).wait_for()
            body = {"query": BIRD, "k": 50, "bm25": True, "mips": True}
            (result,) = page.request.post(f"{at_helpdesk}/search", data=body).json()["results"]
            places = {row["doc_id"]: row["rank"] for row in result["mips"]}
            for hit, item in zip(result["hits"], page.locator('[data-column="ours"] li').all(), strict=False):
                gain = places[hit["doc_id"]] - hit["rank"]
                kind = "up" if gain > 0 else "down" if gain < 0 else "same"
                tag = item.locator(".move").first
                assert kind in (tag.get_attribute("class") or "")
                if gain:
                    assert f"{abs(gain)} vs MIPS" in tag.inner_text()
            title = result["hits"][0]["title"]
            assert f"Ours puts “{title}” first" in person.part("compare", "status").inner_text()

    def test_the_same_document_stands_out_in_all_columns(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("compare", "?q=refund")
            first = page.locator('[data-column="ours"] li').first
            first.focus()
            name = first.get_attribute("data-document")
            alike = page.locator(".same-document").evaluate_all("nodes => nodes.map(node => node.dataset.document)")
            assert len(alike) >= 2
            assert set(alike) == {name}
            assert page.locator(".lines path").count() > 3

    def test_without_plain_vector_search_it_says_how_to_turn_it_on(self, chromium, own: str) -> None:
        with visiting(chromium, own) as person:
            page = person.goes_to("compare", "?q=refund")
            page.locator(".column.off", has_text="caravan serve own --mips").wait_for()
            assert page.locator(".column[data-column]").count() == 2


class TestAsk:
    def test_an_answer_cites_documents_that_one_can_go_to(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("ask")
            page.set_default_timeout(120_000)  # the first question waits for the calibration
            person.types("#ask-box", "How long is the warranty on the battery?")
            page.keyboard.press("Enter")
            page.locator(".cite").first.wait_for()
            page.locator(".cite").first.click()
            cited = page.evaluate("document.activeElement.id")
            assert cited == page.locator(".cite").first.get_attribute("href").lstrip("#")
            assert page.locator(f"#{cited} .text").inner_text()
            assert "%" in page.locator(".confidence").inner_text()

    def test_what_the_documents_do_not_know_is_not_answered(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("ask", "?q=who+wrote+the+opera+about+the+flute")
            page.set_default_timeout(120_000)
            page.get_by_role("button", name="Ask", exact=True).click()
            page.locator('.answer[data-known="false"]', has_text="I don't know").wait_for()
            page.get_by_role("heading", name="Closest documents").wait_for()
            assert page.locator(".source").count() > 0


class TestDocuments:
    def test_a_document_that_is_added_is_found_at_once_edited_and_removed(self, chromium, own: str) -> None:
        with visiting(chromium, own) as person:
            person.expected += ("409",)
            page = person.goes_to("documents")
            page.get_by_role("button", name="Add a document").click()
            for name, value in FOLDING.items():
                page.locator(f"#document-{name}").fill(value)
            page.get_by_role("button", name="Save").click()
            page.locator("#toast", has_text="is added and found from now on").wait_for()
            page.get_by_role("button", name="Search for it").click()
            assert page.locator(".result").first.get_attribute("data-document") == FOLDING["id"]
            assert "topic travel" in page.locator(".result .labels").first.inner_text()

            person.goes_to("documents", f"?id={FOLDING['id']}")
            page.get_by_role("button", name=f"Edit {FOLDING['id']}").click()
            page.locator("#document-text").fill("A folded tandem pays half.")
            page.get_by_role("button", name="Save").click()
            page.locator(".document .text", has_text="A folded tandem pays half.").wait_for()

            page.get_by_role("button", name="Add a document").click()
            for name, value in FOLDING.items():
                page.locator(f"#document-{name}").fill(value)
            page.get_by_role("button", name="Save").click()
            page.locator("#document-dialog .fault", has_text="is there with another text").wait_for()
            assert page.locator("#document-title").input_value() == FOLDING["title"]
            page.keyboard.press("Escape")

            page.get_by_role("button", name=f"Remove {FOLDING['id']}").click()
            page.get_by_role("button", name="Keep it").click()
            assert page.locator(".document").count() == 1
            page.get_by_role("button", name=f"Remove {FOLDING['id']}").click()
            page.locator("#remove-dialog").get_by_role("button", name="Remove").click()
            person.part("documents", "status").get_by_text("0 documents").wait_for()

    def test_the_list_is_turned_page_by_page_and_filtered_by_id(self, chromium, at_helpdesk: str) -> None:
        with visiting(chromium, at_helpdesk) as person:
            page = person.goes_to("documents")
            first = page.locator(".document").first.get_attribute("data-document")
            page.get_by_role("button", name="Later").click()
            person.part("documents", "range").get_by_text("21 to 40 of 107").wait_for()
            assert page.locator(".document").first.get_attribute("data-document") != first
            page.reload()
            person.part("documents", "range").get_by_text("21 to 40 of 107").wait_for()
            person.types("#documents-filter", "track-or")
            person.sees(".document", 1)
            assert page.locator(".document").get_attribute("data-document") == "track-order"
            assert page.get_by_role("button", name="Add a document").is_disabled()
            assert "needs a write key" in person.part("documents", "reason").inner_text()
