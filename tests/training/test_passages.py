"""Passages of documents beside queries in a training."""

import pytest
import torch

from caravan.data.records import Example
from caravan.training.trainer import fit
from toy_training import (
    EXAMPLES,
    UNSEEN,
    VALIDATION,
    assert_same_bits,
    differ,
    toy_config,
    toy_retriever,
    trained,
)

both_stages = pytest.mark.parametrize("stage", ["head", "adapter"])
PASSAGES = [Example("u v w", ("d4",)), Example("x y u", ("d4",)), Example("b c d", ("d0",))]


@both_stages
def test_passages_are_trained_on_like_queries(backbone, stage):
    config = toy_config()
    free = {"hold_unseen": False}
    beside = trained(backbone, stage, config, EXAMPLES, passages=PASSAGES, head=free)
    among = trained(backbone, stage, config, [*EXAMPLES, *PASSAGES], head=free)
    assert_same_bits(beside, among)
    assert "head.rows" in differ(beside, trained(backbone, stage, config, EXAMPLES, head=free))


@both_stages
def test_a_row_that_only_passages_know_is_held_like_one_that_nothing_knows(backbone, stage):
    config = toy_config(weight_decay=0.1)
    start = toy_retriever(backbone).trainable_state()
    held = trained(backbone, stage, config, EXAMPLES, passages=PASSAGES)
    among = trained(backbone, stage, config, [*EXAMPLES, *PASSAGES])
    for name in ("head.rows", "head.bias"):
        assert torch.equal(held[name][UNSEEN], start[name][UNSEEN])
        assert (among[name][UNSEEN] != start[name][UNSEEN]).all()


def test_validation_is_scored_on_validation_also_beside_passages(backbone):
    records = {
        count: fit(
            toy_retriever(backbone),
            EXAMPLES,
            "head",
            toy_config(rate=1e-9, dropout=0.0, epochs=1),
            seed=0,
            passages=PASSAGES[:count],
            validation=VALIDATION,
        )
        for count in (0, 3)
    }
    assert records[3][0].validation_recall == records[0][0].validation_recall
