"""The bundled corpus keeps what its makers promised: size, sites, no repeats, no templates, clean texts."""

import re
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from caravan.data.dataset import Dataset
from caravan.data.records import Example
from caravan.training.baselines import bm25

LARGEST_TRIGRAM_OVERLAP = 0.6  # share of common character trigrams above which two questions are near-duplicates


@pytest.fixture(scope="module")
def helpdesk() -> Dataset:
    return Dataset.read("helpdesk", validation_fraction=0)


@pytest.fixture(scope="module")
def questions(helpdesk) -> list[str]:
    return [example.text for example in (*helpdesk.train, *helpdesk.test)]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())


def trigrams(text: str) -> frozenset[str]:
    text = " ".join(text.casefold().split())
    return frozenset(text[start : start + 3] for start in range(max(1, len(text) - 2)))


def near_duplicates(texts: list[str], threshold: float) -> list[tuple[str, str]]:
    """All pairs whose trigram sets have a Jaccard similarity above the threshold."""
    # Sets in order of size: a pair whose sizes differ by more than the threshold cannot overlap that much.
    sets = sorted(((trigrams(text), text) for text in texts), key=lambda pair: len(pair[0]))
    found = []
    for place, (larger, text) in enumerate(sets):
        for smaller, other in reversed(sets[:place]):
            if len(smaller) <= threshold * len(larger):
                break
            common = len(smaller & larger)
            if common > threshold * (len(smaller) + len(larger) - common):
                found.append((other, text))
    return found


def one_word_apart(texts: list[str]) -> list[list[str]]:
    """Groups of texts of three or more words that are equal but for one word (in shorter ones, too little is left)."""
    by_frame = defaultdict(list)
    for text in texts:
        parts = words(text)
        if len(parts) >= 3:
            for place in range(len(parts)):
                by_frame[(*parts[:place], None, *parts[place + 1 :])].append(text)
    return [group for group in by_frame.values() if len(group) > 1]


def topic_shares(examples: list[Example], topics: dict[str, str]) -> dict[str, float]:
    counts = Counter(topics[example.doc_ids[0]] for example in examples)
    return {topic: count / len(examples) for topic, count in counts.items()}


def test_there_are_eighty_articles_with_twelve_training_and_four_test_questions_each(helpdesk):
    articles = {document.doc_id for document in helpdesk.catalogue.documents}
    trained = Counter(example.doc_ids[0] for example in helpdesk.train)
    tested = Counter(example.doc_ids[0] for example in helpdesk.test)
    assert len(articles) >= 80
    assert trained.keys() == articles
    assert min(trained.values()) >= 12
    assert tested == dict.fromkeys(articles, 4)


def test_every_question_has_one_article(helpdesk):
    assert {len(example.doc_ids) for example in (*helpdesk.train, *helpdesk.test)} == {1}


def test_four_sites_of_uneven_size_ask(helpdesk):
    trained = Counter(example.columns["site"] for example in helpdesk.train)
    tested = Counter(example.columns["site"] for example in helpdesk.test)
    assert trained.keys() == tested.keys() == {"harbour", "online", "workshop", "fleetdesk"}
    assert max(trained.values()) >= 3 * min(trained.values())


def test_the_mix_of_topics_differs_between_any_two_sites(helpdesk):
    topics = {document.doc_id: document.metadata["topic"] for document in helpdesk.catalogue.documents}
    by_site = defaultdict(list)
    for example in helpdesk.train:
        by_site[example.columns["site"]].append(example)
    mixes = {site: topic_shares(examples, topics) for site, examples in by_site.items()}
    for one, other in combinations(mixes, 2):
        names = mixes[one].keys() | mixes[other].keys()
        total_variation = sum(abs(mixes[one].get(name, 0) - mixes[other].get(name, 0)) for name in names) / 2
        assert total_variation > 0.2, (one, other)


def test_no_question_is_asked_twice_in_or_across_splits(questions):
    assert [text for text, count in Counter(map(str.casefold, questions)).items() if count > 1] == []


@pytest.mark.slow
def test_no_two_questions_are_near_duplicates(questions):
    assert near_duplicates(questions, LARGEST_TRIGRAM_OVERLAP) == []


def test_the_search_for_near_duplicates_finds_one():
    texts = ["where is my bike", "Where is  my bikes", "is the battery warm"]
    # 14 trigrams, and the same with "kes" more: 14 of 15 in common.
    assert near_duplicates(texts, 0.9) == [("where is my bike", "Where is  my bikes")]
    assert near_duplicates(texts, 14 / 15) == []


def test_no_two_questions_differ_in_one_word_only(questions):
    assert one_word_apart(questions) == []


def test_the_search_for_templates_finds_one():
    texts = ["Where is my bike?", "where is my lock", "Where was my saddle", "bike?", "lock?"]
    assert one_word_apart(texts) == [["Where is my bike?", "where is my lock"]]


def test_no_opening_of_three_words_is_common(questions):
    openings = Counter(tuple(words(text)[:3]) for text in questions)
    ((opening, count),) = openings.most_common(1)
    assert count < 0.03 * len(questions), opening


def test_words_alone_answer_some_questions_but_not_most(helpdesk):
    documents = helpdesk.catalogue.documents
    ranking = bm25([example.text for example in helpdesk.test], [document.content for document in documents])
    first = [documents[row].doc_id for row in ranking.rows[:, 0]]
    right = sum(doc_id in example.doc_ids for doc_id, example in zip(first, helpdesk.test, strict=True))
    assert 0.2 < right / len(helpdesk.test) < 0.7


def test_texts_are_clean(helpdesk, questions):
    for text in (*questions, *(f"{document.title} {document.text}" for document in helpdesk.catalogue.documents)):
        assert text == " ".join(text.split())
        assert not [character for character in text if unicodedata.category(character).startswith("C")], text


def test_articles_have_sixty_to_a_hundred_and_thirty_words(helpdesk):
    for document in helpdesk.catalogue.documents:
        assert 60 <= len(document.text.split()) <= 130, document.doc_id


def test_every_article_has_a_title_of_its_own(helpdesk):
    titles = [document.title for document in helpdesk.catalogue.documents]
    assert all(titles)
    assert len(set(titles)) == len(titles)
