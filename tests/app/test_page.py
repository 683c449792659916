"""The files of the web page: what they may not hold, and what is sent with them."""

import re
from pathlib import Path

import pytest

import caravan.app.web
from served import KEYS, refusal, serving

FOLDER = Path(caravan.app.web.__file__).with_name("page")
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_every_file_is_served_without_a_key_and_says_what_a_browser_must_not_do(master: Path) -> None:
    with serving(master, keys=KEYS) as client:
        for path in FILES:
            answer = client.get(f"/{path.name}")
            assert answer.content == path.read_bytes()
            assert answer.headers["content-type"].partition(";")[0] == TYPES[path.suffix]
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
        assert client.get("/").content == (FOLDER / "index.html").read_bytes()


def test_what_the_service_answers_is_not_hidden_by_the_page(master: Path) -> None:
    with serving(master) as client:
        assert client.get("/info").json()["documents"] == 3
        assert "content-security-policy" not in client.get("/info").headers
        refusal(client.get("/none"), 404)
        refusal(client.get("/../served.py"), 404)


def test_without_the_files_there_is_no_page(master: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("caravan.app.web.service._PAGE", tmp_path / "page")
    with serving(master) as client:
        refusal(client.get("/"), 404)


def test_files_are_sent_compressed_and_are_small(master: Path) -> None:
    with serving(master) as client:
        answers = [client.get(f"/{path.name}") for path in FILES]
    assert all(answer.headers["content-encoding"] == "gzip" for answer in answers if len(answer.content) > 500)
    assert sum(int(answer.headers["content-length"]) for answer in answers) < 60 * 2**10


def test_a_file_that_a_browser_has_is_not_sent_again(master: Path) -> None:
    with serving(master) as client:
        first = client.get("/main.js")
        again = client.get("/main.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_another_host(path: Path) -> None:
    names = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[^\s\"']*", text(path)))
    assert names <= {"http://www.w3.org/2000/svg"}  # the name of a language, never fetched


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_html_or_code_of_text(path: Path) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser|setHTML"
    assert re.findall(ways, text(path)) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_says_in_its_first_line_what_lives_there_and_has_short_lines(path: Path) -> None:
    lines = text(path).splitlines()
    assert lines[0].startswith("// ")
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 400


def test_the_page_has_no_script_or_style_inside() -> None:
    page = text(FOLDER / "index.html")
    assert re.findall(r"\sstyle=|<style|\son[a-z]+=|javascript:", page) == []
    assert all(re.fullmatch(r'<script (type="module" )?src="\w+\.js"></script>', tag) for tag in scripts_in(page))


def scripts_in(page: str) -> list[str]:
    return re.findall(r"<script.*?</script>", page)


def test_every_script_is_used() -> None:
    used = {name for path in FILES for name in re.findall(r'(?:from "\./|src=")(\w+\.js)"', text(path))}
    assert used == {path.name for path in SCRIPTS}
