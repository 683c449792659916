"""The MTEB models and task, by the real mteb: its measures are an independent implementation of ours."""

import mteb
import pytest
from mteb.models import SearchProtocol
from torch.nn.functional import normalize

from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.data.records import Document, Example
from caravan.errors import DataError
from caravan.integrations.mteb import FrozenSearch, TrainedSearch
from caravan.integrations.mteb_task import retrieval_task
from caravan.training.baselines import mips
from caravan.training.evaluation import measure, rank
from saved_retrievers import make_retriever
from toy_experiments import toy_dataset
from toy_training import CATALOGUE, toy_retriever

DATA = toy_dataset()
GOLD = [CATALOGUE.gold_rows(example) for example in DATA.test]


def scores_of(model, task) -> dict[str, float]:
    (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    (split,) = result.scores.values()
    return split[0]


def corpus_of(documents):
    return [{"id": document.doc_id, "title": document.title, "text": document.text} for document in documents]


def searched(model, texts, **options):
    queries = [{"id": text, "text": text} for text in texts]
    return model.search(queries, **{"top_k": 10, **options})


@pytest.fixture(scope="module")
def trained(backbone):
    return make_retriever(backbone, CATALOGUE.documents)


def test_mteb_s_measures_of_a_trained_retriever_are_ours(trained):
    model = TrainedSearch(trained)
    assert isinstance(model, SearchProtocol)
    theirs = scores_of(model, retrieval_task(DATA))
    ours = measure(rank(trained.score_batches([example.text for example in DATA.test])), GOLD)
    assert theirs["recall_at_1"] == pytest.approx(ours["recall@1"].value, abs=1e-5)
    assert theirs["recall_at_5"] == 1  # of five documents
    assert theirs["mrr_at_10"] == pytest.approx(ours["mrr@10"].value, abs=1e-5)
    assert theirs["ndcg_at_10"] == pytest.approx(ours["ndcg@10"].value, abs=1e-5)
    assert theirs["main_score"] == theirs["ndcg_at_10"]
    assert 0 < theirs["recall_at_1"] < 1


def test_the_frozen_model_ranks_by_inner_product_with_the_documents(backbone):
    model = FrozenSearch(backbone.config)
    assert isinstance(model, SearchProtocol)
    theirs = scores_of(model, retrieval_task(DATA, "validation"))
    encoder = toy_retriever(backbone).encoder
    queries = encoder.encode([example.text for example in DATA.validation])
    documents = encoder.encode([document.content for document in CATALOGUE])
    ours = measure(mips(queries, documents), [CATALOGUE.gold_rows(example) for example in DATA.validation])
    assert theirs["recall_at_1"] == pytest.approx(ours["recall@1"].value, abs=1e-5)
    assert theirs["ndcg_at_10"] == pytest.approx(ours["ndcg@10"].value, abs=1e-5)
    (scores,) = searched(model, [DATA.validation[0].text]).values()
    products = normalize(queries[:1], dim=1) @ documents.T
    assert list(scores.values()) == pytest.approx(sorted(products[0].tolist(), reverse=True), abs=1e-6)


def test_a_query_with_several_gold_documents_counts_each(trained):
    examples = (Example("a b c", ("d0", "d1"), "x"), Example("k l m", ("d2",), "y"))
    data = Dataset("letters", CATALOGUE, DATA.train, (), examples)
    first = [hits[0].doc_id for hits in trained.search([example.text for example in examples], 1)]
    expected = (0.5 * (first[0] in ("d0", "d1")) + (first[1] == "d2")) / 2
    assert scores_of(TrainedSearch(trained), retrieval_task(data))["recall_at_1"] == pytest.approx(expected)


def test_scores_are_the_head_s_and_the_best_come_first(trained):
    model = TrainedSearch(trained)
    model.index(corpus_of(CATALOGUE))
    found = searched(model, ["a b", "k"], top_k=3)
    assert found == {
        query: {hit.doc_id: hit.score for hit in hits}
        for query, hits in zip(["a b", "k"], trained.search(["a b", "k"], 3), strict=True)
    }
    assert [list(scores) for scores in found.values()] == [
        [hit.doc_id for hit in hits] for hits in trained.search(["a b", "k"], 3)
    ]


def test_of_a_part_of_the_documents_only_that_part_is_found(trained):
    model = TrainedSearch(trained)
    model.index(corpus_of(CATALOGUE.documents[1:4]))
    assert set(searched(model, ["a b"])["a b"]) == {"d1", "d2", "d3"}


def test_reranking_ranks_what_it_is_given(trained):
    model = TrainedSearch(trained)
    model.index(corpus_of(CATALOGUE))
    order = [hit.doc_id for hit in trained.search("a b", 5)]
    found = searched(model, ["a b", "k"], top_ranked={"a b": ["d3", "d0"]})
    assert list(found["a b"]) == [doc_id for doc_id in order if doc_id in ("d0", "d3")]
    assert found["k"] == {}


@pytest.mark.parametrize("other", [Document("d1", "other words"), Document("unknown", "f g h i j")])
def test_documents_that_it_was_not_trained_on_are_refused(trained, other):
    with pytest.raises(DataError, match="FrozenSearch"):
        TrainedSearch(trained).index(corpus_of([CATALOGUE.documents[0], other]))


def test_another_training_is_another_revision_so_that_no_kept_result_is_taken_for_it(trained, backbone, tmp_path):
    other = make_retriever(backbone, CATALOGUE.documents, seed=1)
    cache = mteb.ResultCache(cache_path=tmp_path)
    results = {}
    for name, retriever in (("one", trained), ("two", other), ("one again", trained)):
        model = TrainedSearch(retriever)
        evaluated = mteb.evaluate(model, retrieval_task(DATA), cache=cache, show_progress_bar=False)
        results[name] = evaluated.task_results[0].scores["test"][0]["ndcg_at_10"]
    assert results["one"] == results["one again"]
    assert results["one"] != results["two"]
    assert TrainedSearch(trained).mteb_model_meta.revision != TrainedSearch(other).mteb_model_meta.revision
    assert TrainedSearch(trained, name="we/ours").mteb_model_meta.name == "we/ours"


def test_another_text_or_split_is_another_revision_of_the_task():
    changed = Catalogue([Document("d0", "a changed text"), *CATALOGUE.documents[1:]])
    tasks = [
        retrieval_task(DATA),
        retrieval_task(DATA, "validation"),
        retrieval_task(Dataset("letters", changed, DATA.train, DATA.validation, DATA.test)),
    ]
    assert len({task.metadata.dataset["revision"] for task in tasks}) == 3
    assert retrieval_task(DATA).metadata.dataset["revision"] == tasks[0].metadata.dataset["revision"]
    assert tasks[1].metadata.eval_splits == ["validation"]
