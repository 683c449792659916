"""The page in a browser, quickly: it draws, searches, and takes no text for HTML (a small retriever, this process)."""

import json

import pytest

from browsing import PAGES, visiting

EVIL = "<img src=x onerror=alert(1)>"


def test_a_query_in_the_address_is_searched_and_its_words_are_marked(chromium, at_small: str) -> None:
    with visiting(chromium, at_small) as person:
        page = person.goes_to("search", "?q=refund")
        page.locator(".result").nth(3).wait_for()
        shares = [float(text.split("%")[0].lstrip("<")) for text in page.locator(".result .number").all_inner_texts()]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert set(page.locator("mark").all_inner_texts()) == {"refund", "Refunds"}
        assert page.title() == "Search · caravan"


def test_html_in_titles_texts_and_metadata_stays_text(chromium, at_small: str) -> None:
    with visiting(chromium, at_small, width=390, look="dark") as person:
        page = person.goes_to("search", "?q=refund")
        page.locator(".result").nth(3).wait_for()
        assert EVIL in page.locator(".result .title").all_inner_texts()
        for name in ("compare", "documents"):
            person.goes_to(name, "?q=refund")
            page.locator(f'[data-view="{name}"] >> text=onerror').first.wait_for()
        cited = {"number": 1, "doc_id": "evil", "title": EVIL, "probability": 0.5}
        answer = {"text": f"{EVIL} [1]", "known": True, "confidence": 0.5, "citations": [cited], "found": [cited]}
        stream = [("piece", {"text": EVIL, "afresh": False}), ("answer", answer | {"generator": EVIL})]
        body = "".join(f"event: {name}\r\ndata: {json.dumps(data)}\r\n\r\n" for name, data in stream)
        page.route("**/ask", lambda route: route.fulfill(content_type="text/event-stream", body=body))
        person.goes_to("ask", "?q=refund")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator(".written", has_text=f"{EVIL} [1]").wait_for()
        assert page.locator(".source h3").inner_text() == EVIL
        assert page.locator("main img, main script").count() == 0
        assert page.locator("a[href*='alert'], [onerror]").count() == 0


def test_every_page_opens_by_its_link_and_back_leads_to_the_one_before(chromium, at_small: str) -> None:
    with visiting(chromium, at_small) as person:
        page = person.goes_to("search")
        for name in PAGES[1:]:
            page.get_by_role("navigation", name="Pages", exact=True).get_by_role("link", name=name.title()).click()
            page.locator(f'[data-view="{name}"]').wait_for()
            assert page.locator("main > section:visible").count() == 1
            page.locator(f"#{name}-heading:focus").wait_for()
        for name in reversed(PAGES[:-1]):
            page.go_back()
            page.locator(f'[data-view="{name}"]').wait_for()
