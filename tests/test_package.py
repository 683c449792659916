"""What holds for the package and the repository as a whole."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import caravan

ROOT = Path(__file__).parents[1]
CODE = [path for folder in ("src", "tests", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = ("datasets", "fastapi", "flwr", "langchain_core", "matplotlib", "mcp", "sklearn", "torch", "transformers")
GENERATED = {
    *(".git", ".hypothesis", ".import_linter_cache", ".pytest_cache", ".ruff_cache", ".venv"),
    *("__pycache__", "build", "caravan.egg-info", "dist", "runs"),
}


def heavy_packages_after(code: str) -> str:
    """Run code in a fresh interpreter; which of the heavy packages it has imported."""
    report = f"import sys; sys.stderr.write(' '.join(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return done.stderr


def files_of_the_repository() -> list[Path]:
    """All files that people write: no environment, cache, build output or result of a run."""
    found = []
    for path in ROOT.iterdir():
        if path.is_dir() and path.name not in GENERATED:
            found += [inner for inner in path.rglob("*") if inner.is_file()]
        elif path.is_file() and path.name != ".coverage":
            found.append(path)
    return [path for path in found if not GENERATED & set(path.relative_to(ROOT).parts)]


def test_importing_caravan_imports_nothing_heavy():
    assert heavy_packages_after("import caravan") == ""


def test_help_imports_nothing_heavy():
    code = """
import sys
from caravan.app.cli import main
sys.argv = ["caravan", "--help"]
try:
    main()
except SystemExit as stop:
    assert stop.code in (0, None), stop.code
"""
    assert heavy_packages_after(code) == ""


def test_the_names_that_the_manual_shows_are_public():
    assert {"Retriever", "Dataset", "train", "federate", "evaluate", "load", "save"} <= set(caravan.__all__)


@pytest.mark.parametrize("name", caravan.__all__)
def test_every_public_name_can_be_imported_and_listed(name):
    assert getattr(caravan, name) is not None
    assert name in dir(caravan)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'retriever_of_everything'"):
        caravan.retriever_of_everything  # noqa: B018


def test_the_version_is_that_of_pyproject():
    assert caravan.__version__ == PROJECT["version"]


def test_every_direct_dependency_is_pinned_to_one_version_that_pyproject_allows():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(pins) == sorted(pins)
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if requirement.name != "caravan":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_no_file_names_a_path_of_somebodys_machine():
    path_of_a_machine = re.compile(rb"(?<![\w.~-])/(?:" + b"|".join((b"work", b"root", b"opt", b"home")) + rb")\b(?!-)")
    files = files_of_the_repository()
    assert ROOT / "src/caravan/errors.py" in files
    assert [path for path in files if path_of_a_machine.search(path.read_bytes())] == []


@pytest.mark.parametrize("path", [path for path in CODE if "tests" not in path.parts], ids=lambda path: path.stem)
def test_every_module_says_in_its_first_line_what_lives_there(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0].strip()


def test_no_python_file_has_more_than_400_lines():
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in CODE}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
