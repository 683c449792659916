"""The README's code runs, its commands exist, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_code_of_the_first_screen_trains_measures_saves_and_finds(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    recall = float(re.findall(r"value=([0-9.]+)", printed[0])[0])
    assert 0.4 < recall < 1  # well above BM25 and MIPS on this corpus
    assert len(printed) == 4
    assert printed[1].endswith("gull-display-stays-black: " + printed[1].split(": ")[1])
    assert (tmp_path / "my-retriever" / "head.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
