"""What marks become: examples, questions held back, pairs that leave the training data."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.app.feedback.lessons import HELD_BACK, Question, classroom, is_held_back, lessons
from caravan.app.feedback.marks import Mark
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document, Example
from toy_experiments import DATASET
from toy_training import CATALOGUE

TAUGHT = next(f"taught {number}" for number in range(100) if not is_held_back(f"taught {number}"))
HELD = next(f"held {number}" for number in range(100) if is_held_back(f"held {number}"))


def test_right_marks_of_one_query_become_one_example_with_all_its_documents() -> None:
    found = lessons([Mark(TAUGHT, "d1", right=True), Mark(TAUGHT, "d0", right=True)], CATALOGUE)
    assert [(example.text, set(example.doc_ids)) for example in found.examples] == [(TAUGHT, {"d0", "d1"})]
    assert found.questions == ()


def test_a_query_that_is_held_back_is_a_question_and_never_an_example() -> None:
    found = lessons([Mark(HELD, "d1", right=True), Mark(HELD, "d0", right=False)], CATALOGUE)
    assert found.examples == ()
    assert found.questions == (Question(HELD, ("d1",), ("d0",)),)


def test_a_wrong_mark_alone_is_no_example_but_contradicts_the_data() -> None:
    found = lessons([Mark(TAUGHT, "d1", right=False)], CATALOGUE)
    assert (found.examples, found.questions) == ((), ())
    assert found.contradicted == {(TAUGHT, "d1")}


def test_marks_of_documents_that_are_no_more_are_counted_and_left_out() -> None:
    found = lessons([Mark(TAUGHT, "gone", right=True), Mark(HELD, "gone", right=False)], CATALOGUE)
    assert (found.examples, found.questions, found.contradicted, found.gone) == ((), (), frozenset(), 2)


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=30), st.booleans())
def test_what_is_held_back_depends_on_the_query_alone(queries: list[str], right: bool) -> None:
    marks = [Mark(query, "d0", right=right) for query in queries]
    found, again = lessons(marks, CATALOGUE), lessons(marks[::-1], CATALOGUE)
    assert found == again
    assert {question.query for question in found.questions} == set(filter(is_held_back, queries))
    assert not {example.text for example in found.examples} & {question.query for question in found.questions}


def test_about_one_query_in_five_is_held_back() -> None:
    held = sum(is_held_back(f"query {number}") for number in range(5000))
    assert abs(held - 5000 / HELD_BACK) < 5 * (5000 * 0.2 * 0.8) ** 0.5  # five standard deviations


def test_a_question_is_answered_by_a_right_document_or_where_none_is_known_by_any_but_the_wrong_ones() -> None:
    assert Question("q", ("a",), ("b",)).answered("a")
    assert not Question("q", ("a",), ("b",)).answered("c")
    assert Question("q", (), ("b",)).answered("c")
    assert not Question("q", (), ("b",)).answered("b")


class TestClassroom:
    def test_marks_join_the_training_queries_and_no_test_query_is_left_to_look_at(self) -> None:
        room = classroom(DATASET, CATALOGUE, lessons([Mark(TAUGHT, "d1", right=True)], CATALOGUE))
        assert list(room.dataset.train[:-1]) == list(DATASET.train)
        assert room.dataset.train[-1].doc_ids == ("d1",)
        assert list(room.dataset.validation) == list(DATASET.validation)
        assert (len(room.dataset.test), room.left_out) == (0, 0)

    def test_a_pair_marked_wrong_leaves_the_training_data_and_its_other_documents_stay(self) -> None:
        first, second = DATASET.train[0], replace(DATASET.train[1], doc_ids=("d0", "d1"))
        data = replace(DATASET, train=(first, second, *DATASET.train[2:]))
        marks = [Mark(first.text, first.doc_ids[0], right=False), Mark(second.text, "d0", right=False)]
        taught = lessons(marks, CATALOGUE)
        room = classroom(data, CATALOGUE, replace(taught, questions=()))
        assert room.left_out == 1
        assert first.text not in [example.text for example in room.dataset.train]
        assert room.dataset.train[0] == replace(second, doc_ids=("d1",))

    def test_queries_of_removed_documents_are_left_out_of_train_and_validation(self) -> None:
        fewer = Catalogue([document for document in CATALOGUE if document.doc_id != "d0"])
        room = classroom(DATASET, fewer, lessons([], fewer))
        assert room.dataset.catalogue is fewer
        assert room.left_out == sum(example.doc_ids == ("d0",) for example in DATASET.train) > 0
        assert {name for example in room.dataset.validation for name in example.doc_ids} <= {"d1", "d2", "d3"}

    def test_documents_that_came_since_can_be_learned(self) -> None:
        more = Catalogue([*CATALOGUE, Document("new", "z z z")])
        room = classroom(DATASET, more, lessons([Mark(TAUGHT, "new", right=True)], more))
        assert room.dataset.train[-1].doc_ids == ("new",)

    def test_neither_a_validation_query_nor_one_held_back_is_trained_on(self) -> None:
        asked = DATASET.validation[0].text
        train = (*DATASET.train, Example(HELD, ("d0",)))
        marks = [Mark(asked, "d0", right=True), Mark(HELD, "d1", right=True)]
        taught = replace(lessons(marks, CATALOGUE), examples=(Example(asked, ("d0",)),))
        room = classroom(replace(DATASET, train=train), CATALOGUE, taught)
        texts = {example.text for example in room.dataset.train}
        assert HELD not in texts
        assert asked not in texts
