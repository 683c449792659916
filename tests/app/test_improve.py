"""`caravan improve`, `versions` and `rollback`: from marks to a new version and back, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from caravan.app.experiment import checkpoint_folder
from caravan.app.feedback.lessons import is_held_back
from caravan.app.feedback.marks import RIGHT, Mark, Marks, now
from caravan.app.feedback.retraining import improve
from caravan.app.feedback.verdict import Tally, Verdict
from caravan.app.feedback.versions import Versions, onto
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.storage import RECORD, load, save
from command_line import Workshop, check_refused, listing, run
from toy_experiments import Raising
from toy_training import assert_same_bits, toy_examples

pytestmark = pytest.mark.usefixtures("few_queries_are_timed")


@pytest.fixture
def model(tmp_path: Path, workshop: Workshop) -> Path:
    return Path(shutil.copytree(workshop.model, tmp_path / "model"))


def _mark(model: Path, count: int = 30) -> tuple[int, int]:
    """Marks as users make them: how many queries are trained on, and held back."""
    marks, held = Marks(model), 0
    for example in toy_examples(count, seed=5):
        marks.add(Mark(example.text, example.doc_ids[0], right=True, time=now()))
        held += is_held_back(example.text)
    assert 0 < held < count
    return count - held, held


def _improve(model: Path, *options: object) -> dict:
    outcome = run("improve", model, "--json", *options)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def _records(model: Path, change) -> None:
    record = json.loads((model / RECORD).read_text())
    change(record)
    (model / RECORD).write_text(json.dumps(record))


def test_marks_become_a_new_version_and_one_command_goes_back(model: Path) -> None:
    trained, held = _mark(model)
    before = load(model).trainable_state()
    done = _improve(model, "--force")  # two epochs on letters: which is better is luck
    assert (done["version"], done["trained"], done["held_back"]) == (2, trained, held)
    names = {tally["name"]: tally for tally in done["tallies"]}
    assert names["marked right"]["questions"] == held
    assert names["validation queries"]["questions"] == 4
    new = load(model)
    assert new.record["dataset"]["train"] == 36 + trained
    assert new.record["dataset"]["test"] == 0
    assert new.record["config"] == json.loads((Versions(model).folder / "1" / RECORD).read_text())["config"]
    assert not new.trainable_state()["head.rows"].equal(before["head.rows"])
    assert not checkpoint_folder(model).exists()
    assert new.record["metrics"]["head"]["metrics"] == done["measures"]["new"]
    assert json.loads(run("info", model, "--json").out)["version"] == 2
    shown = run("versions", model)
    assert f"* {2:>3}" in shown.out
    assert f"{trained} marked queries learned, {held} held back from 1" in shown.out
    listed = json.loads(run("versions", model, "--json").out)["versions"]
    assert [(version["number"], version["current"]) for version in listed] == [(2, True), (1, False)]
    assert "Version 1 is in place" in run("rollback", model).out
    assert_same_bits(load(model).trainable_state(), before)
    assert json.loads(run("rollback", model, "--to", 2, "--json").out) == {"version": 2}
    assert_same_bits(load(model).trainable_state(), new.trainable_state())


def test_the_same_marks_give_the_same_bits_whatever_version_is_in_place(model: Path) -> None:
    _mark(model)
    _improve(model, "--force")
    first = load(model).trainable_state()
    _improve(model, "--force")
    assert_same_bits(load(model).trainable_state(), first)


def test_a_dry_run_compares_and_changes_nothing(model: Path) -> None:
    _mark(model)
    before = listing(model.parent)
    outcome = run("improve", model, "--dry-run")
    assert "marked right" in outcome.out
    locks = [name for name in listing(model.parent) if name.endswith(".lock")]
    assert {name: what for name, what in listing(model.parent).items() if name not in locks} == {
        name: what for name, what in before.items() if name not in locks
    }


def test_a_worse_one_is_not_put_in_place_unless_forced(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _mark(model)
    worse = Verdict((Tally("validation queries", 4, 3, 1, 0, 2),), {})
    monkeypatch.setattr("caravan.app.feedback.retraining.judge", lambda *_, **__: worse)
    before = listing(model)
    outcome = run("improve", model)
    assert outcome.code == 1
    assert "The old version stays: the new weights answer 1 of 4 questions first, the old ones 3" in outcome.out
    assert "--force" in outcome.out
    assert listing(model) == before
    assert not Versions(model).folder.exists()
    assert _improve(model, "--force")["version"] == 2


def test_documents_that_came_through_the_service_are_kept_and_trained(model: Path) -> None:
    retriever = load(model)
    bell = Document("bell", "z z z z")
    fewer = [document for document in retriever.catalogue if document.doc_id != "d3"]
    save(onto(retriever, Catalogue([*fewer, bell])), model)
    marks = Marks(model)
    for number in range(1, 12):
        marks.add(Mark("z " * number, "bell", right=True, time=now()))
    marks.add(Mark("p q r", "d3", right=True, time=now()))  # of a document that was removed since
    done = _improve(model, "--force")
    assert done["of_removed_documents"] == 1
    assert done["left_out"] > 0  # training queries of the removed document
    new = load(model)
    assert new.catalogue.ids == (*(document.doc_id for document in fewer), "bell")
    assert "changes" not in new.record
    row = new.catalogue.row("bell")
    assert not new.head.rows[row].equal(load(Versions(model).folder / "1").head.rows[row])


def test_a_damaged_line_is_named_and_passed_over(model: Path) -> None:
    _mark(model)
    path = Marks(model).folder / RIGHT
    path.write_bytes(b"{broken\n" + path.read_bytes())
    outcome = run("improve", model, "--dry-run")
    assert "1 damaged lines" in outcome.out
    assert f"{path}, line 1" in outcome.out


def test_without_new_marks_or_changes_there_is_nothing_to_learn(model: Path) -> None:
    before = listing(model)
    check_refused(run("improve", model), "nothing new to learn", "mark results first")
    Marks(model).folder.mkdir()
    (Marks(model).folder / RIGHT).write_bytes(b"")
    check_refused(run("improve", model), "nothing new to learn")
    assert listing(model) == before
    _mark(model)
    _improve(model, "--force")
    check_refused(run("improve", model), "no new mark")
    Marks(model).add(Mark("a b a b", "d0", right=True, time=now()))
    assert "marked right" in run("improve", model, "--dry-run").out


def test_data_that_is_not_where_it_was_is_named_with_a_remedy(model: Path, workshop: Workshop) -> None:
    _mark(model)
    _records(model, lambda record: record["config"]["data"].update(path="/nowhere/letters"))
    check_refused(run("improve", model), "/nowhere/letters", "say where it is now with --data")
    done = _improve(model, "--data", workshop.data, "--force")
    assert done["version"] == 2
    assert load(model).record["config"]["data"]["path"] == str(workshop.data)


def test_a_retriever_that_does_not_say_what_it_was_trained_on_needs_data(model: Path) -> None:
    _mark(model)
    _records(model, lambda record: record.pop("config"))
    check_refused(run("improve", model), "does not say what it was trained on; give --data")


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("privacy", {"mode": "dp-sgd", "epsilon": 3.0}, "differential privacy"),
        ("federation", {"clients": 3}, "clients that do not pool their queries"),
        ("federation", {"partition": "column", "column": "site"}, "caravan personalise"),
    ],
)
def test_marks_do_not_undo_what_a_training_promised(model: Path, part: str, values: dict, says: str) -> None:
    _mark(model)
    _records(model, lambda record: record["config"][part].update(values))
    before = listing(model)
    check_refused(run("improve", model), says)
    assert listing(model) == before


def test_marks_are_data_for_train_and_for_personalise(model: Path, workshop: Workshop, tmp_path: Path) -> None:
    _mark(model)
    right = Marks(model).folder / RIGHT
    options = ("-c", workshop.quick, "-o", tmp_path / "new", "--documents", model / "documents.jsonl")
    outcome = run("train", right, *options)
    assert outcome.code == 0, outcome.err
    assert load(tmp_path / "new").record["dataset"]["train"] + load(tmp_path / "new").record["dataset"][
        "validation"
    ] == len(Marks(model).read().marks)
    outcome = run("personalise", model, "--data", right, "-o", tmp_path / "own")
    assert outcome.code == 0, outcome.err


def test_refusals_are_one_line(model: Path, tmp_path: Path) -> None:
    check_refused(run("improve", tmp_path / "none"), "no such folder")
    check_refused(run("versions", tmp_path / "none"), "no such folder")
    check_refused(run("rollback", tmp_path / "none"), "no such folder")
    check_refused(run("rollback", model), "came from no other")
    check_refused(run("rollback", model, "--to", 3), "no version 3 is kept")
    check_refused(run("improve", model, "--keep", 0), "--keep", code=2)


def test_an_interrupted_attempt_goes_on_to_the_same_bits(model: Path, tmp_path: Path) -> None:
    _mark(model)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    shutil.copytree(Marks(model).folder, Marks(other).folder)
    always = {"training.checkpoint_seconds": 1e-9}
    with pytest.raises(KeyboardInterrupt):
        improve(str(model), None, always, force=True, report=Raising("training", KeyboardInterrupt(), after=4))
    assert checkpoint_folder(model).is_dir()
    assert Versions(model).listed()[0].number == 1
    improve(str(model), None, always, force=True, resume=True)
    improve(str(other), None, always, force=True)
    assert_same_bits(load(model).trainable_state(), load(other).trainable_state())
