"""Documents added to and removed from a retriever."""

import pytest
import torch

from caravan.config import AdapterConfig, BackboneConfig, HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.errors import DataError
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.changing import with_documents, without_documents
from caravan.model.encoder import Encoder
from caravan.model.retriever import Retriever
from saved_retrievers import DOCUMENTS, QUERIES, make_retriever
from tiny_models import make_tiny_bert

BELL = Document("bell", "turn the ring to the left", "The bell")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Backbone:
    return load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path_factory.mktemp("bert")))))


def add(retriever: Retriever, *documents: Document) -> Retriever:
    return with_documents(retriever, documents, retriever.encoder.encode([document.content for document in documents]))


@pytest.mark.parametrize("hidden", [0, 8])
def test_an_untrained_retriever_grows_to_what_it_would_have_been_from_the_start(bert: Backbone, hidden: int) -> None:
    encoder = Encoder(bert, IdentityAdapter(bert.embedding_width))

    def start(documents) -> Retriever:
        rows = encoder.encode([document.content for document in documents])
        return Retriever.start(bert, Catalogue(documents), rows, head=HeadConfig(hidden=hidden))

    grown, wanted = add(start(DOCUMENTS), BELL), start([*DOCUMENTS, BELL])
    assert torch.allclose(grown.head.rows, wanted.head.rows, atol=1e-6)
    assert grown.catalogue.fingerprint == wanted.catalogue.fingerprint


@pytest.mark.parametrize("hidden", [0, 8])
def test_scores_of_the_others_stay_and_the_new_row_has_their_mean_length_and_bias(bert: Backbone, hidden: int) -> None:
    before = make_retriever(bert, adapter=AdapterConfig(), head=HeadConfig(hidden=hidden))
    after = add(before, BELL)
    vectors = before.encoder.encode(QUERIES)
    assert torch.equal(after.head.rows[:3], before.head.rows)
    assert torch.allclose(after.head(vectors)[:, :3], before.head(vectors), atol=1e-5)
    assert after.head.rows[3].norm().item() == pytest.approx(before.head.rows.norm(dim=1).mean().item(), rel=1e-5)
    assert after.head.bias[3].item() == pytest.approx(before.head.bias.mean().item(), abs=1e-6)
    assert len(before.catalogue) == 3
    assert after.encoder is before.encoder


def test_of_all_rows_of_its_length_the_new_one_scores_its_own_text_highest(bert: Backbone) -> None:
    after = add(make_retriever(bert, adapter=AdapterConfig(), head=HeadConfig(hidden=8)), BELL)
    query = after.head.pre(after.encoder.encode([BELL.content]))[0]
    best = torch.nn.functional.normalize(query, dim=0) * after.head.rows[3].norm()
    assert (query @ after.head.rows[3]).item() == pytest.approx((query @ best).item(), rel=1e-4)


def test_an_edited_document_keeps_its_place_and_its_row(bert: Backbone) -> None:
    before = make_retriever(bert)
    edited = Document("login", "another text", metadata={"a": "b"})
    after = add(before, BELL, edited)
    assert after.catalogue.ids == ("parcel", "login", "money", "bell")
    assert after.catalogue.document(1) == edited
    assert torch.equal(after.head.rows[:3], before.head.rows)


def test_what_is_added_and_removed_leaves_the_retriever_as_it_was(bert: Backbone) -> None:
    before = make_retriever(bert, adapter=AdapterConfig(), head=HeadConfig(hidden=8))
    after = without_documents(add(before, BELL), {"bell"})
    state, own = after.trainable_state(), before.trainable_state()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)
    assert after.record == before.record


def test_removing_takes_the_rows_of_others_along(bert: Backbone) -> None:
    before = make_retriever(bert)
    after = without_documents(before, ["login"])
    assert after.catalogue.ids == ("parcel", "money")
    assert torch.equal(after.head.rows, before.head.rows[[0, 2]])
    assert torch.equal(after.head.bias, before.head.bias[[0, 2]])


def test_changes_that_make_no_sense_are_refused(bert: Backbone) -> None:
    retriever = make_retriever(bert)
    with pytest.raises(DataError, match="no document 'nobody'"):
        without_documents(retriever, ["nobody"])
    with pytest.raises(DataError, match="at least one document"):
        without_documents(retriever, retriever.catalogue.ids)
    with pytest.raises(DataError, match="duplicate document id"):
        add(retriever, BELL, BELL)
    with pytest.raises(DataError, match="give one a document"):
        with_documents(retriever, [BELL], torch.zeros(2, 32))
