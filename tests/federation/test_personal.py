"""A head of a client's own lies between the shared head and its own, where its held-out queries say, and stays put."""

from dataclasses import replace

import pytest
import torch

from caravan.data.records import Example
from caravan.errors import DataError, TrainingError
from caravan.federation.personal import FEWEST, personalise
from toy_training import assert_same_bits, differ, toy_config, toy_examples, toy_retriever

OTHERS = {"d0": "d1", "d1": "d2", "d2": "d3", "d3": "d0"}


def odd_client(count: int = 60) -> list[Example]:
    """Queries of a client to whom every query means another document than to everybody else."""
    return [replace(example, doc_ids=(OTHERS[example.doc_ids[0]],)) for example in toy_examples(count, noise=0.1)]


def test_a_client_that_differs_from_all_others_gets_a_head_that_ranks_its_queries_better(backbone):
    retriever = toy_retriever(backbone)
    personal = personalise(retriever, odd_client(), toy_config(epochs=8), seed=1)
    assert personal.share > 0
    assert personal.recalls[personal.share] == max(personal.recalls.values()) > personal.recalls[0.0] + 0.3
    assert (personal.examples, personal.held_out) == (48, 12)
    found = [retriever.search(example.text, 1)[0].doc_id in example.doc_ids for example in odd_client()]
    assert sum(found) / len(found) > 0.6


def test_the_head_is_the_mixture_of_shared_and_local_number_by_number(backbone):
    states = {}
    for share in (0.0, 0.25, 1.0):
        retriever = toy_retriever(backbone, adapter="full", hidden=3)
        personalise(retriever, odd_client(), toy_config(), shares=[share], seed=1)
        states[share] = retriever.trainable_state()
    assert_same_bits(states[0.0], toy_retriever(backbone, hidden=3).trainable_state())
    for name, mixed in states[0.25].items():
        expected = 0.75 * states[0.0][name].double() + 0.25 * states[1.0][name].double()
        torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=1e-6)
    moved = differ(states[1.0], states[0.0])
    assert "head.rows" in moved
    assert all(name.startswith("head.") for name in moved)


def test_where_the_local_head_is_no_better_the_shared_one_stays_bit_for_bit(backbone):
    retriever = toy_retriever(backbone)
    start = retriever.trainable_state()
    personal = personalise(retriever, odd_client(), toy_config(epochs=0))
    assert set(personal.recalls.values()) == {personal.recalls[0.0]}
    assert personal.share == 0
    assert_same_bits(retriever.trainable_state(), start)


def test_the_same_seed_gives_the_same_head(backbone):
    def made():
        retriever = toy_retriever(backbone)
        return personalise(retriever, odd_client(), toy_config(dropout=0.2), seed=3), retriever.trainable_state()

    (first, tensors), (second, again) = made(), made()
    assert first == second
    assert_same_bits(tensors, again)


def test_queries_of_one_text_are_never_on_both_sides(backbone):
    doubled = [replace(example, query_id=f"{example.query_id}-{copy}") for copy in (1, 2) for example in odd_client(20)]
    personal = personalise(toy_retriever(backbone), doubled, toy_config(epochs=0))
    assert (personal.examples, personal.held_out) == (32, 8)


def test_the_record_says_what_was_done_and_drops_what_was_measured_of_the_shared_head(backbone):
    retriever = toy_retriever(backbone)
    retriever.record = {"metrics": {}, "metrics_split": "test", "seed": 7, "privacy": "Trained without it."}
    personal = personalise(retriever, odd_client(), toy_config(epochs=0), shares=(0, 0.5))
    assert retriever.record.keys() == {"seed", "privacy", "personal"}
    assert retriever.record["privacy"].startswith("Trained without it. Made personal on one client's own queries.")
    recall = personal.recalls[0]
    expected = {"share": 0, "recalls": {"0": recall, "0.5": recall}, "examples": 48, "held_out": 12}
    assert retriever.record["personal"] == expected


@pytest.mark.parametrize("shares", [(), (0.5, 1.5), (-0.1,), (float("nan"),)])
def test_shares_outside_of_0_to_1_are_refused(backbone, shares):
    with pytest.raises(DataError, match="numbers from 0 to 1"):
        personalise(toy_retriever(backbone), odd_client(), shares=shares)


def test_too_few_queries_are_refused(backbone):
    with pytest.raises(DataError, match=rf"^{FEWEST - 1} queries of different text are too few"):
        personalise(toy_retriever(backbone), odd_client(FEWEST - 1) * 2)


def test_a_training_that_diverges_leaves_the_shared_head(backbone):
    retriever = toy_retriever(backbone, scale=50.0)
    start = retriever.trainable_state()
    config = toy_config(epochs=1, batch_size=99, rate=3e38, optimizer="sgd", max_gradient_norm=None)
    with pytest.raises(TrainingError, match="no longer finite"):
        personalise(retriever, odd_client(), config)
    assert_same_bits(retriever.trainable_state(), start)
