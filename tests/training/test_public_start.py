import pytest

from caravan.data.records import Example
from caravan.training.public_start import start_on_passages
from caravan.training.trainer import fit
from toy_training import LETTERS, Log, assert_same_bits, differ, toy_config, toy_retriever

PASSAGES = [
    Example(" ".join(letters[start : start + 3]), (doc_id,))
    for doc_id, letters in LETTERS.items()
    for start in range(3)
]

both_stages = pytest.mark.parametrize("stage", ["head", "adapter"])


@both_stages
def test_passages_are_trained_on_as_queries_are_without_privacy(backbone, stage):
    config, log = toy_config(epochs=2), Log()
    by_hand, retriever = toy_retriever(backbone), toy_retriever(backbone)
    fit(by_hand, PASSAGES, stage, config, seed=3)
    start_on_passages(retriever, PASSAGES, stage, config, seed=3, report=log)
    assert_same_bits(retriever.trainable_state(), by_hand.trainable_state())
    assert differ(retriever.trainable_state(), toy_retriever(backbone).trainable_state())
    assert {p.task for p in log.told if "training" in p.task} == {f"passages: training the {stage}"}


def test_without_passages_nothing_comes_first(backbone):
    retriever = toy_retriever(backbone)
    before = retriever.trainable_state()
    start_on_passages(retriever, [], "head", toy_config(), seed=0)
    assert not differ(before, retriever.trainable_state())
