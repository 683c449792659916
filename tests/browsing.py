"""A person's browser for tests: a real Chromium that may ask one host only, and services to point it at."""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
import pytest

from command_line import start_program

if TYPE_CHECKING:
    from fastapi import FastAPI
    from playwright.sync_api import Browser, BrowserContext, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),  # as root, without a screen or a network
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WIDTHS = (1280, 390)  # pixels: a laptop and a telephone
LOOKS = ("light", "dark")
PAGES = ("search", "compare", "ask", "training", "documents")


@contextmanager
def browser() -> Iterator["Browser"]:
    """A Chromium; where there is none, the test is skipped with the reason."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = environ.get("CARAVAN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is found; install one or name it in CARAVAN_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield started
        started.close()


@dataclass
class Person:
    """Somebody in front of the page; what the browser did wrong is kept and must be nothing in the end.

    Attributes:
        page: the browser's tab.
        address: of the service.
        faults: errors of scripts, breaches of the content policy, requests to other hosts.
        expected: parts of messages of the browser that are no fault, such as of an answer 401.
    """

    page: "Page"
    address: str
    faults: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def goes_to(self, name: str, query: str = "") -> "Page":
        """Opens one of the pages by its address."""
        self.page.goto(f"{self.address}/#/{name}{query}")
        self.page.locator(f'[data-view="{name}"]').wait_for()
        return self.page

    def part(self, name: str, part: str) -> Any:
        """A part of a page."""
        return self.page.locator(f'[data-view="{name}"] [data-part="{part}"]')

    def types(self, box: str, text: str, *, delay: int = 15) -> None:
        """Types into a box, key by key."""
        self.page.locator(box).press_sequentially(text, delay=delay)

    def sees(self, what: str, count: int) -> None:
        """Waits until there are so many of something."""
        self.page.locator(what).nth(count).wait_for(state="detached")
        self.page.locator(what).nth(count - 1).wait_for()

    def check(self) -> None:
        """Nothing went wrong that was not expected."""
        assert [fault for fault in self.faults if not any(word in fault for word in self.expected)] == []


@contextmanager
def visiting(
    chromium: "Browser", address: str, *, width: int = 1280, look: str = "light", **options: Any
) -> Iterator[Person]:
    """A tab of its own, without any history; requests to another host are refused and noted."""
    context: BrowserContext = chromium.new_context(
        viewport={"width": width, "height": 860}, color_scheme=look, reduced_motion="reduce", **options
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    person = Person(page, address)

    def note(request: Any) -> None:
        if urlsplit(request.url).netloc != urlsplit(address).netloc:
            person.faults.append(f"request to {request.url}")

    context.on("request", note)

    def note_message(message: Any) -> None:
        if message.type == "error":
            person.faults.append(f"{message.text} ({message.location['url']})")

    context.on("console", note_message)
    context.on("weberror", lambda error: person.faults.append(str(error.error)))
    context.on("dialog", lambda dialog: person.faults.append(f"dialog {dialog.message}"))
    try:
        yield person
        person.check()
    finally:
        context.close()


@contextmanager
def hosted(app: "FastAPI") -> Iterator[str]:
    """An application on a socket of this process; its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _wait(lambda: server.started, 30)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def program_serving(folder: Path, *options: str) -> Iterator[str]:
    """The real `caravan serve` in a process of its own; its address."""
    with start_program("serve", str(folder), "--port", "0", *options, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline().decode())
        assert found
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        try:
            _wait(lambda: httpx2.get(f"{found[0]}/health", timeout=60).status_code == 200, 120)
            yield found[0]
        finally:
            process.terminate()
            process.wait(60)
            reader.join()


def _wait(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("it never came")
