"""Every example runs with the real packages and prints what it promises; all share one trained folder."""

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from llama_index.core.llms import MockLLM

from caravan import Dataset, evaluate, load

EXAMPLES = Path(__file__).parents[2] / "examples"
FOUND = "gull-display-stays-black"  # the first hit for the question that all examples ask, as in the README
FOLDER = "helpdesk-retriever"

Run = Callable[..., list[str]]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder to run in, with vectors that all examples share."""
    place = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("CARAVAN_CACHE", str(place / "cache"))
        patch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
        patch.setenv("MTEB_CACHE", str(place / "mteb"))
        yield place


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out.splitlines()

    return run


@pytest.fixture(scope="module")
def trained(place: Path) -> str:
    """What `search.py` trains without being told where; the other examples load it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["search.py"])
        runpy.run_path(str(EXAMPLES / "search.py"), run_name="__main__")
    assert (place / FOLDER / "head.safetensors").is_file()
    return FOLDER


def first_hits(lines: list[str], count: int = 3) -> list[str]:
    """The ids in lines such as `93%  ID: TITLE`, whose shares never rise."""
    matches = [match for line in lines if (match := re.fullmatch(r" *(\d+)% +([\w-]+): (.+)", line))]
    shares = [int(match[1]) for match in matches]
    assert shares == sorted(shares, reverse=True)
    assert len(matches) == count
    return [match[2] for match in matches]


def first_topic(line: str) -> str:
    """The name in a line such as `62%  display`."""
    return line.partition("%")[2].strip()


def share(line: str) -> float:
    """The number at the end of a line."""
    return float(line.split()[-1])


def test_every_example_has_a_test_and_a_line_in_the_table():
    tests = Path(__file__).read_text(encoding="utf-8")
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(names) >= 9
    assert [name for name in names if f'run("{name}"' not in tests] == []
    assert [name for name in names if f"| `{name}` |" not in table] == []


def test_search_trains_measures_and_finds(run: Run, place: Path, trained: str):
    lines = run("search.py", "named")
    assert 0.55 < share(lines[0]) < 1  # MIPS: 0.498
    assert first_hits(lines)[0] == FOUND
    assert load(place / "named").search("refund") == load(trained).search("refund")


def test_langchain_finds_and_fills_a_prompt(run: Run, trained: str):
    lines = run("with_langchain.py", trained)
    assert first_hits(lines)[0] == FOUND
    assert lines[-1].endswith("how do i cancel an order?")
    assert int(re.findall(r"has (\d+) characters", lines[-1])[0]) > 500


def test_llama_index_finds_and_answers_from_what_is_probable(run: Run, trained: str):
    lines = run("with_llama_index.py", trained)
    assert first_hits(lines)[0] == FOUND
    assert load(trained).search("how do i cancel an order?", 1)[0].doc_id in lines[-1]


def test_haystack_survives_yaml_and_finds(run: Run, trained: str):
    lines = run("with_haystack.py", trained)
    assert first_hits(lines)[0] == FOUND
    assert int(re.findall(r"has (\d+) characters", lines[-1])[0]) > 500


def test_mteb_measures_both(run: Run, trained: str):
    frozen, ours = (line for line in run("with_mteb.py", trained) if line.startswith("caravan/"))
    assert frozen.startswith("caravan/frozen: nDCG@10 0.67")  # README: MIPS 67.4
    assert share(frozen) == 0.498  # README: 49.8
    assert share(ours) == pytest.approx(evaluate(load(trained), Dataset.read("helpdesk"))["recall@1"].value, abs=6e-4)


def test_sklearn_searches_settings_and_predicts(run: Run, trained: str):
    lines = run("with_sklearn.py")
    assert lines[0].startswith("best: {'learning_rate': 0.001}")
    assert 0.6 < share(lines[1]) < 1
    assert first_topic(lines[2]) == "display"


def test_mcp_answers_an_assistant(run: Run, trained: str):
    lines = run("with_mcp.py", trained)
    assert lines[0] == "tools: ['search', 'ask']"
    assert first_hits(lines)[0] == FOUND
    assert any(re.search(r"\[1\]", line) for line in lines)
    assert lines[-1].startswith(f"{FOUND} in full: ")


def test_federated_trains_on_four_sites(run: Run, trained: str):
    *sites, recall = run("federated.py")
    assert len(sites) == 4
    assert sum(int(re.findall(r": (\d+) questions", line)[0]) for line in sites) > 2000
    assert 0.55 < share(recall) < 1


def test_private_says_what_was_spent(run: Run, trained: str):
    lines = run("private.py")
    assert "differential privacy for each training query" in lines[0]
    ((this, overall),) = re.findall(r"epsilon (\d+\.\d+) in this training, (\d+\.\d+) in all runs", lines[1])
    assert 2.5 < float(this) <= 3
    assert float(overall) >= float(this)
    assert 0.4 < share(lines[2]) < 1


def test_the_lines_of_the_manual_run(place: Path, trained: str, capfd: pytest.CaptureFixture[str]):
    manual = (EXAMPLES.parent / "docs/integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", manual, flags=re.DOTALL)
    assert len(blocks) == 5
    train = Dataset.read("helpdesk").train[:200]
    given = {
        "your_model": MockLLM(),
        "texts": [example.text for example in train],
        "labels": [example.columns["site"] for example in train],
    }
    for block in blocks:
        exec(compile(block.replace("my-retriever", trained), "docs/integrations.md", "exec"), dict(given))
    assert FOUND in capfd.readouterr().out
