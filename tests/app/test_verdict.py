"""Old against new: what is counted, and the rule."""

import pytest
import scipy.stats  # an independent sign test
from hypothesis import given
from hypothesis import strategies as st

from caravan.app.feedback.lessons import Question
from caravan.app.feedback.verdict import Tally, Verdict, judge
from caravan.data.records import Example
from caravan.training.features import FeatureStore
from saved_retrievers import make_retriever


@given(won=st.integers(0, 30), lost=st.integers(0, 30))
def test_the_chance_is_that_of_a_sign_test(won: int, lost: int) -> None:
    tally = Tally("x", 100, 50, 50 + won - lost, won, lost)
    expected = scipy.stats.binomtest(lost, won + lost, alternative="greater").pvalue if won + lost else 1.0
    assert tally.chance == pytest.approx(expected)


def _verdict(*pairs: tuple[int, int]) -> Verdict:
    """Sets of 100 questions by how many the new weights win and lose."""
    return Verdict(
        tuple(Tally(f"set {n}", 100, 50, 50 + won - lost, won, lost) for n, (won, lost) in enumerate(pairs)), {}
    )


def test_equal_or_better_is_taken_and_worse_in_sum_is_not() -> None:
    assert _verdict((0, 0)).objection is None
    assert _verdict((3, 3)).objection is None
    assert _verdict((5, 1), (0, 3)).objection is None
    assert "49 of 100 questions first, the old ones 50" in str(_verdict((0, 1)).objection)
    assert "98 of 200" in str(_verdict((0, 3), (1, 0)).objection)


def test_one_set_that_speaks_against_it_by_more_than_chance_is_enough() -> None:
    assert _verdict((10, 0), (0, 4)).objection is None  # 1/16
    assert "set 1" in str(_verdict((10, 0), (0, 5)).objection)  # 1/32


def test_questions_on_which_the_old_weights_are_known_to_fail_can_object_but_not_make_up_for_a_loss() -> None:
    lost, won = Tally("queries", 100, 50, 49, 0, 1), Tally("wrong", 100, 0, 60, 60, 0, even=False)
    assert "49 of 100" in str(Verdict((lost, won), {}).objection)
    equal, against = Tally("queries", 100, 50, 50, 0, 0), Tally("wrong", 100, 50, 45, 0, 5, even=False)
    assert "on wrong the new weights lose 5" in str(Verdict((equal, against), {}).objection)
    assert "nothing to compare on" in str(Verdict((won,), {}).objection)


def test_without_a_question_nothing_is_taken() -> None:
    assert "nothing to compare on" in str(Verdict((), {}).objection)


def test_what_each_answers_first_is_counted_as_by_searching(bert) -> None:
    old, new = make_retriever(bert, seed=0), make_retriever(bert, seed=1)
    texts = [f"where is parcel {number}" for number in range(20)]
    validation = [Example(text, ("money",)) for text in texts]
    questions = [Question(text, (), ("login",)) for text in texts[:7]]
    questions += [Question(text, ("parcel",), ()) for text in texts[7:12]]
    verdict = judge(old, new, validation, questions, store=FeatureStore())
    first = {name: [hits[0].doc_id for hits in r.search(texts, 1)] for name, r in (("old", old), ("new", new))}
    assert first["old"] != first["new"]
    right = {name: [doc_id == "money" for doc_id in found] for name, found in first.items()}
    on_queries, on_right, on_wrong = verdict.tallies
    assert [tally.even for tally in verdict.tallies] == [True, True, False]
    assert (on_queries.old, on_queries.new) == (sum(right["old"]), sum(right["new"]))
    pairs = list(zip(right["old"], right["new"], strict=True))
    assert (on_queries.won, on_queries.lost) == (pairs.count((False, True)), pairs.count((True, False)))
    assert (on_wrong.questions, on_right.questions) == (7, 5)
    assert on_wrong.new == sum(doc_id != "login" for doc_id in first["new"][:7])
    assert on_right.old == sum(doc_id == "parcel" for doc_id in first["old"][7:12])
    assert verdict.measures["new"]["recall@1"].value == pytest.approx(sum(right["new"]) / 20)
