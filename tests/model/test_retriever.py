from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from caravan.config import AdapterConfig, HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.errors import DataError, StorageError
from caravan.model.backbone import Backbone
from caravan.model.retriever import Retriever

Backbones = Callable[..., Backbone]

TEXTS = ["return a broken lamp", "late order", "lost password", "opening hours", "pay by card", "speak to somebody"]
CATALOGUE = Catalogue(Document(f"d{row}", text, title=f"title {row}") for row, text in enumerate(TEXTS))


@pytest.fixture(scope="module")
def bert(backbone_of: Backbones) -> Backbone:
    return backbone_of("bert")


def mips(backbone: Backbone, **settings: Any) -> Retriever:
    """A retriever at its start, its rows the document vectors."""
    bare = Retriever.start(backbone, CATALOGUE, torch.zeros(len(CATALOGUE), 32))
    return Retriever.start(backbone, CATALOGUE, bare.encoder.encode(TEXTS), **settings)


def with_rows(backbone: Backbone, rows: Tensor) -> Retriever:
    documents = Catalogue(Document(f"d{row}", "text") for row in range(len(rows)))
    return Retriever.start(backbone, documents, rows)


class TestSearch:
    @pytest.mark.parametrize("hidden", [0, 8])
    def test_at_the_start_it_is_maximum_inner_product_search(self, bert: Backbone, hidden: int) -> None:
        retriever = mips(bert, head=HeadConfig(hidden=hidden))
        queries = ["where is my lamp", "i forgot the word", "when do you open"]
        rows, vectors = retriever.encoder.encode(TEXTS).numpy(), retriever.encoder.encode(queries).numpy()
        for vector, hits in zip(vectors, retriever.search(queries, k=6), strict=True):
            scores = np.array([sum(float(a) * float(b) for a, b in zip(vector, row, strict=True)) for row in rows])
            assert [hit.doc_id for hit in hits] == [f"d{row}" for row in np.argsort(-scores)]
            assert [hit.score / 20 for hit in hits] == pytest.approx(np.sort(scores)[::-1], abs=1e-5)

    def test_a_document_finds_itself(self, bert: Backbone) -> None:
        hits = mips(bert).search("lost password", k=3)
        first = hits[0]
        assert (first.rank, first.doc_id, first.title, first.text) == (1, "d2", "title 2", "lost password")
        assert first.score == pytest.approx(20.0, abs=1e-4)
        assert [hit.rank for hit in hits] == [1, 2, 3]

    def test_probabilities_are_the_softmax_over_the_whole_catalogue(self, bert: Backbone) -> None:
        retriever = mips(bert)
        hits = retriever.search("lost lamp", k=6)
        powers = np.exp(np.array([hit.score for hit in hits]))
        assert [hit.probability for hit in hits] == pytest.approx(powers / powers.sum(), rel=1e-5)
        assert sum(hit.probability for hit in hits) == pytest.approx(1.0, abs=1e-6)
        assert retriever.search("lost lamp", k=2) == hits[:2]

    def test_more_hits_than_documents_means_all(self, bert: Backbone) -> None:
        assert len(mips(bert).search("lamp", k=100)) == 6

    @pytest.mark.parametrize("k", [0, -1])
    def test_fewer_than_one_hit_is_refused(self, bert: Backbone, k: int) -> None:
        with pytest.raises(DataError, match=f"k = {k}: ask for at least one hit"):
            mips(bert).search("lamp", k=k)

    @pytest.mark.parametrize("text", ["", "  ", ["lamp", ""]])
    def test_an_empty_query_is_refused(self, bert: Backbone, text: str | list[str]) -> None:
        with pytest.raises(DataError, match="is empty; give at least one word"):
            mips(bert).search(text)

    def test_several_queries_give_a_list_each_in_their_order(self, bert: Backbone) -> None:
        retriever = mips(bert)
        queries = ["pay by card please", "lamp", "order"]
        together, alone = retriever.search(queries, k=6), [retriever.search(query, k=6) for query in queries]
        assert [[hit.doc_id for hit in hits] for hits in together] == [[hit.doc_id for hit in hits] for hits in alone]
        assert retriever.search([], k=2) == []

    def test_of_equal_scores_the_earlier_document_comes_first(self, bert: Backbone) -> None:
        row = mips(bert).encoder.encode(["lamp"])
        retriever = with_rows(bert, torch.cat([-row, row.expand(3006, 32), -row]))  # a multiple of any vector's width
        assert [hit.doc_id for hit in retriever.search("lamp", k=5)] == ["d1", "d2", "d3", "d4", "d5"]
        assert [hit.doc_id for hit in retriever.search("lamp", k=3008)][-2:] == ["d0", "d3007"]

    def test_equal_scores_at_the_bar_are_cut_by_row_behind_better_ones(self, bert: Backbone) -> None:
        row = mips(bert).encoder.encode(["lamp"])
        retriever = with_rows(bert, torch.cat([row * 0.5, row * 0.5, row, row * 0.5, row * 0.7]))
        assert [hit.doc_id for hit in retriever.search("lamp", k=4)] == ["d2", "d4", "d0", "d1"]

    def test_scores_come_in_batches_in_the_order_of_the_texts(self, bert: Backbone) -> None:
        retriever = mips(bert)
        batches = list(retriever.score_batches(TEXTS, batch_size=4))
        assert [tuple(batch.shape) for batch in batches] == [(4, 6), (2, 6)]
        assert torch.cat(batches).argmax(dim=1).tolist() == [0, 1, 2, 3, 4, 5]
        assert not batches[0].requires_grad


class TestTrainables:
    def test_the_state_names_adapter_and_head_only(self, bert: Backbone) -> None:
        retriever = mips(bert, adapter=AdapterConfig(kind="core", rank=4), head=HeadConfig(hidden=3))
        shapes = {name: tuple(tensor.shape) for name, tensor in retriever.trainable_state().items()}
        assert shapes == {
            "adapter.core": (4, 4),
            "head.rows": (6, 32),
            "head.bias": (6,),
            "head.log_scale": (),
            "head.pre.inner": (32, 3),
            "head.pre.inner_bias": (3,),
            "head.pre.outer": (3, 32),
        }

    def test_the_state_is_a_copy(self, bert: Backbone) -> None:
        retriever = mips(bert)
        retriever.trainable_state()["head.rows"].zero_()
        assert bool(retriever.head.rows.any())

    @pytest.mark.parametrize("kind", ["full", "lowrank", "core", "none"])
    def test_a_state_taken_over_gives_the_same_hits(self, bert: Backbone, kind: str) -> None:
        settings = AdapterConfig(kind=kind, rank=4)  # type: ignore[arg-type]
        trained, fresh = mips(bert, adapter=settings), mips(bert, adapter=settings)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in trained.named_trainables():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        assert fresh.search("lamp", k=6) != trained.search("lamp", k=6)
        fresh.load_trainable_state(trained.trainable_state())
        assert fresh.search("lamp", k=6) == trained.search("lamp", k=6)

    def test_every_parameter_that_can_be_trained_is_in_the_state(self, bert: Backbone) -> None:
        retriever = mips(bert, adapter=AdapterConfig(bias=True), head=HeadConfig(hidden=3))
        trainable = {id(parameter) for parameter in retriever.parameters() if parameter.requires_grad}
        assert trainable == {id(parameter) for _, parameter in retriever.named_trainables()}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("head.bias"), r"missing \['head.bias'\], unknown \[\]"),
            (lambda state: state.update(extra=torch.zeros(1)), r"missing \[\], unknown \['extra'\]"),
            (
                lambda state: state.update({"head.rows": torch.zeros(5, 32)}),
                r"head.rows has shape \(5, 32\), this retriever needs \(6, 32\)",
            ),
            (
                lambda state: state["head.log_scale"].fill_(float("nan")),
                "head.log_scale holds values that are not finite",
            ),
            (lambda state: state["head.rows"][5].fill_(float("inf")), "head.rows holds values that are not finite"),
        ],
    )
    def test_a_state_that_does_not_fit_is_refused_and_nothing_of_it_taken_over(
        self, bert: Backbone, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        retriever = mips(bert)
        before = retriever.trainable_state()
        state = {name: tensor + 1 for name, tensor in before.items()}
        change(state)
        with pytest.raises(StorageError, match=message):
            retriever.load_trainable_state(state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in retriever.trainable_state().items())


@pytest.mark.parametrize("shape", [(5, 32), (6, 31)])
def test_rows_that_fit_neither_catalogue_nor_vectors_are_refused(bert: Backbone, shape: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="does not fit 6 documents and vectors of width 32; give one row a document"):
        Retriever.start(bert, CATALOGUE, torch.zeros(shape))
