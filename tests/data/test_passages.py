"""Documents cut into texts to train on."""

from hypothesis import given
from hypothesis import strategies as st

from caravan.data.catalogue import Catalogue
from caravan.data.passages import document_passages, sentences
from caravan.data.records import Document

REFUND = Document("refund", "We pay back within a week. Ask at the desk!\nKeep your receipt.", "How refunds work")


def texts(documents, most=99):
    return [passage.text for passage in document_passages(Catalogue(documents), most)]


def test_title_and_sentences_become_examples_of_their_document():
    passages = document_passages(Catalogue([REFUND]), 99)
    assert [passage.text for passage in passages] == [
        "How refunds work",
        "We pay back within a week.",
        "Ask at the desk!",
        "Keep your receipt.",
    ]
    assert {passage.doc_ids for passage in passages} == {("refund",)}
    assert [passage.query_id for passage in passages] == ["refund#0", "refund#1", "refund#2", "refund#3"]


def test_a_long_sentence_is_cut_every_32_words():
    words = [f"word{number}" for number in range(70)]
    assert texts([Document("long", " ".join(words))]) == [
        " ".join(words[:32]),
        " ".join(words[32:64]),
        " ".join(words[64:]),
    ]


def test_what_is_too_short_to_tell_anything_is_left_out():
    assert texts([Document("short", "Yes. No. Twelve chars.")]) == ["Twelve chars."]
    assert texts([Document("edge", "Eleven char.")]) == ["Eleven char."]  # 12 with its full stop
    assert texts([Document("under", "Under edge.")]) == []


def test_a_text_of_several_documents_is_left_out_of_all_of_them():
    other = Document("other", "Ask at the desk!\nOpen from nine to five.")
    assert texts([REFUND, other]) == [
        "How refunds work",
        "We pay back within a week.",
        "Keep your receipt.",
        "Open from nine to five.",
    ]


def test_a_text_that_stands_twice_in_one_document_comes_once():
    assert texts([Document("twice", "Ask at the desk!\nAsk at the desk!")]) == ["Ask at the desk!"]


def test_the_title_comes_once_where_the_text_begins_with_it():
    assert texts([Document("same", "How refunds work\nKeep your receipt.", "How refunds work")]) == [
        "How refunds work",
        "Keep your receipt.",
    ]


def test_of_many_some_are_taken_evenly_the_first_among_them():
    lines = [f"This is line number {number}." for number in range(10)]
    document = Document("lines", "\n".join(lines))
    assert texts([document], 4) == [lines[0], lines[2], lines[5], lines[7]]
    assert texts([document], 10) == lines
    assert texts([document], 0) == []


@given(st.lists(st.text(max_size=200), min_size=1, max_size=5), st.integers(0, 5))
def test_any_text_gives_at_most_so_many_distinct_passages_each_of_its_own_words(contents, most):
    catalogue = Catalogue([Document(str(number), text) for number, text in enumerate(contents)])
    passages = document_passages(catalogue, most)
    assert len({passage.text for passage in passages}) == len(passages)
    for doc_id in catalogue.ids:
        own = [passage.text for passage in passages if passage.doc_ids == (doc_id,)]
        assert len(own) <= most
        words = contents[int(doc_id)].split()
        assert all(set(text.split()) <= set(words) and len(text) >= 12 for text in own)


def test_a_text_is_cut_after_its_sentences_and_at_the_ends_of_its_lines():
    assert sentences("One  two. Three? Yes!\n\nFour\nfive 1.5 ") == ["One two.", "Three?", "Yes!", "Four", "five 1.5"]
    assert sentences(" \n ") == []
