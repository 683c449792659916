"""Who trains on what the documents say."""

from dataclasses import replace

import pytest

from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from toy_experiments import DATASET
from toy_training import CATALOGUE


@pytest.mark.parametrize("federation", [{}, {"clients": 2, "rounds": 1}])
def test_what_documents_say_is_trained_on_once_whoever_trains(settings, prepare, monkeypatch, federation):
    texts = [f"{doc_id} says this first. {doc_id} says that then." for doc_id in CATALOGUE.ids]
    catalogue = Catalogue([Document(doc_id, text) for doc_id, text in zip(CATALOGUE.ids, texts, strict=True)])
    dealt = []
    for room in ("caravan.app.learning", "caravan.federation.local"):
        monkeypatch.setattr(
            f"{room}.fit",
            lambda *arguments, passages, **options: (dealt.append([each.text for each in passages]), [])[1],
        )
    experiment = prepare(settings(mode="head", federation=federation), replace(DATASET, catalogue=catalogue))
    experiment.run()
    assert len(dealt) == max(1, len(experiment.shards))
    assert all(abs(len(part) - 10 / len(dealt)) < 1 for part in dealt)
    whole = [f"{doc_id} says {what}." for doc_id in CATALOGUE.ids for what in ("this first", "that then")]
    assert sorted(text for part in dealt for text in part) == sorted(whole)
    assert experiment.retriever.record["dataset"]["passages"] == 10
