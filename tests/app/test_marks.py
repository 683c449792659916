"""The store of marks: what it keeps, what kills, full disks and other writers leave of it, and that train takes it."""

import json
import multiprocessing
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from caravan.app.feedback.marks import RIGHT, WRONG, Mark, Marks, feedback_folder, now, weights_name
from caravan.data.dataset import Dataset
from caravan.errors import DataError, StorageError
from caravan.storage import load, save
from disks import small_disk

MARK = Mark("my bird went dark", "battery", right=True, time="2026-01-02T03:04:05.000006Z", model="abc")


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path / "model")


def test_without_a_mark_nothing_is_made(marks: Marks) -> None:
    assert marks.read().marks == ()
    assert marks.take_back("a", "b") is None
    assert not marks.folder.exists()


def test_a_mark_is_a_line_of_a_query_file_that_only_its_owner_may_read(marks: Marks) -> None:
    assert marks.add(MARK) == 1
    lines = (marks.folder / RIGHT).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "my bird went dark", "label": "battery", "time": "2026-01-02T03:04:05.000006Z", "model": "abc"}
    ]
    assert marks.folder.stat().st_mode & 0o077 == 0
    assert (marks.folder / RIGHT).stat().st_mode & 0o077 == 0


def test_the_same_mark_again_adds_nothing_and_the_opposite_takes_its_place(marks: Marks) -> None:
    marks.add(MARK)
    assert marks.add(Mark(MARK.query, MARK.doc_id, right=True, time=now())) == 1
    assert (marks.folder / RIGHT).read_text().count("\n") == 1
    assert marks.add(Mark(MARK.query, MARK.doc_id, right=False, time=now())) == 1
    assert [mark.right for mark in marks.read().marks] == [False]
    assert (marks.folder / RIGHT).read_bytes() == b""


def test_what_is_taken_back_is_gone_from_the_disk(marks: Marks) -> None:
    marks.add(MARK)
    marks.add(Mark("another", "bell", right=False, time=now()))
    assert marks.take_back(MARK.query, MARK.doc_id) == 1
    assert marks.take_back(MARK.query, MARK.doc_id) is None
    assert b"bird" not in b"".join(path.read_bytes() for path in marks.folder.iterdir())
    assert [mark.query for mark in marks.read().marks] == ["another"]


def test_marks_come_oldest_first_whichever_they_are(marks: Marks) -> None:
    for number, right in enumerate([True, False, True]):
        marks.add(Mark(f"q{number}", "d", right=right, time=now()))
    assert [mark.query for mark in marks.read().marks] == ["q0", "q1", "q2"]


def test_a_training_reads_the_right_ones_as_they_are(marks: Marks, tmp_path: Path) -> None:
    (tmp_path / "documents.csv").write_text("doc_id,text\nbattery,the battery\nbell,the bell\n")
    marks.add(MARK)
    marks.add(Mark("wie spät?\n\N{SNOWMAN}", "bell", right=True, time=now()))
    marks.add(Mark("never", "bell", right=False, time=now()))
    data = Dataset.read(marks.folder / RIGHT, documents=tmp_path / "documents.csv", validation_fraction=0)
    assert [(example.text, example.doc_ids) for example in data.train] == [
        ("my bird went dark", ("battery",)),
        ("wie spät?\n\N{SNOWMAN}", ("bell",)),
    ]


@pytest.mark.parametrize("query", ["", "  ", "a\x00b", "\ud800", "x" * (2**20 + 1)])
def test_what_no_training_could_read_is_refused(marks: Marks, query: str) -> None:
    with pytest.raises(DataError):
        marks.add(Mark(query, "d", right=True, time=now()))
    assert marks.read().marks == ()


def test_a_damaged_line_is_passed_over_named_and_kept(marks: Marks) -> None:
    marks.add(MARK)
    path = marks.folder / RIGHT
    damaged = b'{"text": 1}\n\xff\xfe\n[1]\n{"text": "q"}\n\n{"text": "", "label": "d"}\n'
    path.write_bytes(damaged + path.read_bytes())
    found = marks.read()
    assert [mark.query for mark in found.marks] == [MARK.query]
    assert found.damaged == tuple(f"{path}, line {number}" for number in (1, 2, 3, 4, 6))
    marks.take_back(MARK.query, MARK.doc_id)
    assert path.read_bytes() == damaged


def test_a_line_that_somebody_wrote_by_hand_counts_even_without_its_end(marks: Marks) -> None:
    marks.add(MARK)
    path = marks.folder / RIGHT
    path.write_bytes(path.read_bytes() + b'{"text": "by hand", "label": "bell"}')
    assert len(marks.read().marks) == 2
    assert marks.add(Mark("third", "bell", right=True, time=now())) == 3
    assert marks.read().damaged == ()


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 60))
def test_what_a_kill_left_of_a_line_gives_way_to_the_next(tmp_path_factory, cut: int) -> None:
    marks = Marks(tmp_path_factory.mktemp("killed") / "model")
    marks.add(MARK)
    marks.add(Mark("torn", "bell", right=True, time=now()))
    path = marks.folder / RIGHT
    path.write_bytes(path.read_bytes()[:-1][:-cut])
    assert [mark.query for mark in marks.read().marks] == [MARK.query]
    marks.add(Mark("next", "bell", right=True, time=now()))
    found = marks.read()
    assert [mark.query for mark in found.marks] == [MARK.query, "next"]
    assert found.damaged == ()


def test_a_kill_between_the_two_files_leaves_the_newer_mark(marks: Marks) -> None:
    marks.add(MARK)
    before = (marks.folder / RIGHT).read_bytes()
    marks.add(Mark(MARK.query, MARK.doc_id, right=False, time=now()))
    (marks.folder / RIGHT).write_bytes(before)  # as if it had not come to removing the old line
    assert [mark.right for mark in marks.read().marks] == [False]
    marks.add(Mark(MARK.query, MARK.doc_id, right=False, time=now()))
    assert (marks.folder / RIGHT).read_bytes() == b""


def _write(folder: Path, writer: int) -> None:
    marks = Marks(folder)
    for number in range(25):
        marks.add(Mark(f"{writer}-{number}", "d", right=number % 2 == 0, time=now()))
        if number % 5 == 4:
            marks.take_back(f"{writer}-{number}", "d")


def test_several_processes_lose_no_mark(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path / "model", number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    found = Marks(tmp_path / "model").read()
    expected = {f"{writer}-{number}" for writer in range(4) for number in range(25) if number % 5 != 4}
    assert {mark.query for mark in found.marks} == expected
    assert found.damaged == ()


def test_a_full_disk_refuses_a_mark_and_loses_none(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        marks = Marks(disk / "model")
        many = (Mark(f"{number} " + "word " * 500, "d", right=True, time=now()) for number in range(1000))
        with pytest.raises(StorageError, match="No space left"):
            deque(map(marks.add, many), maxlen=0)
        found = marks.read()
        kept = 1000 - 1 - sum(1 for _ in many)
        assert len(found.marks) == kept > 0
        assert found.damaged == ()
        (disk / "model.feedback" / WRONG).unlink(missing_ok=True)


def test_marks_stay_where_they_are_when_the_retriever_is_saved_anew(folder: Path) -> None:
    marks = Marks(folder)
    marks.add(MARK)
    save(load(folder), folder)
    assert marks.read().marks == (MARK,)


def test_a_link_to_a_retriever_has_the_marks_of_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert feedback_folder(tmp_path / "link") == feedback_folder(tmp_path / "real") == tmp_path / "real.feedback"


def test_weights_are_named_by_all_their_numbers(folder: Path) -> None:
    retriever = load(folder)
    name = weights_name(retriever)
    assert name == weights_name(load(folder))
    retriever.head.bias.data[-1] += 1
    assert weights_name(retriever) != name


class Store(RuleBasedStateMachine):
    """The store beside a dictionary, with other readers, torn lines and files written by others in between."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.place = tempfile.TemporaryDirectory()
        self.model = Path(self.place.name) / "model"
        self.marks, self.expected = Marks(self.model), {}

    texts = st.sampled_from(["a", "b", "\N{SNOWMAN}", 'quote " \\ \n line', "a\u2028b"])
    ids = st.sampled_from(["d", "e"])

    @rule(query=texts, doc_id=ids, right=st.booleans())
    def add(self, query: str, doc_id: str, right: bool) -> None:
        self.expected[query, doc_id] = right
        assert self.marks.add(Mark(query, doc_id, right, now())) == len(self.expected)

    @rule(query=texts, doc_id=ids)
    def take_back(self, query: str, doc_id: str) -> None:
        there = self.expected.pop((query, doc_id), None) is not None
        assert self.marks.take_back(query, doc_id) == (len(self.expected) if there else None)

    @rule(name=st.sampled_from([RIGHT, WRONG]))
    def killed_while_adding(self, name: str) -> None:
        if self.marks.folder.is_dir():
            with (self.marks.folder / name).open("ab") as file:
                file.write(b'{"text": "torn", "la')

    @rule()
    def restart(self) -> None:
        self.marks = Marks(self.model)

    @invariant()
    def they_agree(self) -> None:
        for marks in (self.marks, Marks(self.model)):
            found = marks.read().marks
            assert {(mark.query, mark.doc_id): mark.right for mark in found} == self.expected
            assert len(found) == len(self.expected)

    def teardown(self) -> None:
        self.place.cleanup()


Store.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_the_store_is_a_dictionary_that_survives = Store.TestCase
