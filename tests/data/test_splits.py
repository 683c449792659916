from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.data.records import Example
from caravan.data.splits import Selection, cut_validation, select


def made(*labels: str, texts: str = "") -> list[Example]:
    texts = texts or "".join(chr(0x4E00 + number) for number in range(len(labels)))
    return [
        Example(text, tuple(label.split("|")), f"train-{n}")
        for n, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


def test_the_cut_is_stratified_by_label():
    train, validation = cut_validation(made(*["a"] * 60, *["b"] * 30, *["c"] * 10), 0.1, seed=1)
    assert Counter(example.doc_ids[0] for example in validation) == {"a": 6, "b": 3, "c": 1}
    assert Counter(example.doc_ids[0] for example in train) == {"a": 54, "b": 27, "c": 9}


def test_many_small_labels_give_their_share_together():
    labels = [f"label{number // 3}" for number in range(300)]
    _, validation = cut_validation(made(*labels), 0.1, seed=1)
    assert len(validation) == 30
    assert max(Counter(example.doc_ids for example in validation).values()) == 1


def test_both_parts_keep_the_order_and_lose_nothing():
    examples = made(*"ababababab" * 3)
    train, validation = cut_validation(examples, 0.3, seed=5)
    assert sorted([*train, *validation], key=examples.index) == examples
    for part in (train, validation):
        assert [examples.index(example) for example in part] == sorted(examples.index(example) for example in part)


def test_the_seed_decides():
    examples = made(*"ab" * 50)
    cuts = [cut_validation(examples, 0.2, seed=seed)[1] for seed in (1, 1, 2)]
    assert cuts[0] == cuts[1] != cuts[2]


def test_equal_texts_stay_on_one_side():
    for seed in range(20):
        train, validation = cut_validation(made(*"aaaaaaaaab", texts="xxyyzzwwvx"), 0.4, seed=seed)
        assert validation
        assert not {example.text for example in train} & {example.text for example in validation}


def test_a_label_never_leaves_train_altogether():
    labels = ["a"] * 10 + ["b", "c|b", "d", "d"]
    for seed in range(20):
        train, validation = cut_validation(made(*labels, texts="0123456789mnoo"), 0.5, seed=seed)
        assert {doc_id for example in train for doc_id in example.doc_ids} == {"a", "b", "c", "d"}
        assert validation


def test_nothing_to_give_means_an_empty_validation_split():
    examples = made(*"abc")
    assert cut_validation(examples, 0.5, seed=0) == (tuple(examples), ())
    assert cut_validation(examples, 0.0, seed=0) == (examples, ())


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.sampled_from("uvwxyz"), st.sampled_from(["a", "b", "c", "a|b", "d|c"])), max_size=40),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 9),
)
def test_the_promises_hold_for_any_examples(pairs, fraction, seed):
    examples = made(*(label for _, label in pairs), texts="".join(text for text, _ in pairs))
    train, validation = cut_validation(examples, fraction, seed=seed)
    assert len(train) + len(validation) == len(examples)
    assert not {example.text for example in train} & {example.text for example in validation}
    every_label = {doc_id for example in examples for doc_id in example.doc_ids}
    assert {doc_id for example in train for doc_id in example.doc_ids} == every_label


def test_a_selection_is_a_view_with_the_behaviour_of_a_sequence():
    examples = made(*"abcde")
    view = Selection(examples, [4, 0, 2])
    assert list(view) == [examples[4], examples[0], examples[2]]
    assert view[0] is examples[4]
    assert view[-1] is examples[2]
    assert list(view[1:]) == [examples[0], examples[2]]
    assert len(view) == 3
    with pytest.raises(IndexError):
        view[3]


def test_selecting_copies_references_in_memory_and_views_anything_else():
    examples = made(*"abc")
    assert select(examples, [2, 0]) == (examples[2], examples[0])
    assert isinstance(select(Selection(examples, [0, 1, 2]), [2]), Selection)


def test_a_label_that_cannot_give_its_share_does_not_strip_the_next_one():
    # "a" owes 15.5 of 31 but has 30 equal texts and one other; "b" owes 10 of 20, and one more at most.
    texts = "x" * 30 + "y" + "".join(chr(0x4E00 + number) for number in range(20))
    for seed in range(10):
        _, validation = cut_validation(made(*"a" * 31, *"b" * 20, texts=texts), 0.5, seed=seed)
        assert 10 <= sum(example.doc_ids == ("b",) for example in validation) <= 11
