"""A training cut into rounds or dealt to clients is the same training."""

import pytest

from caravan.federation.flower import run_federation
from caravan.federation.rounds import Update
from caravan.training.trainer import fit
from toy_training import (
    EXAMPLES,
    assert_same_bits,
    differ,
    largest_difference,
    move,
    toy_config,
    toy_retriever,
    trained,
)

both_stages = pytest.mark.parametrize("stage", ["head", "adapter"])


@both_stages
def test_two_rounds_continue_schedule_and_order_of_one_training(backbone, stage):
    config = toy_config(epochs=4, optimizer="sgd", rate=0.3)
    whole = trained(backbone, stage, config)
    half = trained(backbone, stage, config, epochs=range(2))
    assert_same_bits(trained(backbone, stage, config, start=half, epochs=range(2, 4)), whole)
    assert move(trained(backbone, stage, config, start=half, epochs=range(2)), whole) > 1e-4  # not just any two epochs


def test_a_rounds_records_are_numbered_as_in_the_whole_training(backbone):
    history = fit(toy_retriever(backbone), EXAMPLES, "head", toy_config(epochs=5), seed=0, epochs=range(2, 4))
    assert [record.epoch for record in history] == [2, 3]


def test_a_round_without_epochs_changes_nothing(backbone):
    config = toy_config(epochs=5)
    assert_same_bits(trained(backbone, "head", config, epochs=range(2, 2)), toy_retriever(backbone).trainable_state())


def federated(backbone, stage, config, shards, **head):
    """The state after one round in which every client trains on its own examples from the same start."""

    def local_train(client, received, number):
        assert number == 1
        state = trained(backbone, stage, config, shards[client], start=received, head=head)
        return Update(client, state, len(shards[client]))

    start = toy_retriever(backbone, **head).trainable_state()
    return run_federation(start, list(shards), local_train, rounds=1)


@both_stages
def test_one_client_and_one_round_equal_central_training(backbone, stage):
    config = toy_config()
    assert_same_bits(federated(backbone, stage, config, {"only": EXAMPLES}), trained(backbone, stage, config, EXAMPLES))


@both_stages
def test_averaged_full_batch_steps_of_uneven_clients_equal_the_central_step(backbone, stage):
    config = toy_config(epochs=1, batch_size=48, rate=0.5, optimizer="sgd", max_gradient_norm=None)
    shards = {"oslo": EXAMPLES[:5], "lima": EXAMPLES[5:16], "pune": EXAMPLES[16:]}
    head = {"hold_unseen": False}  # clients that see other documents would hold other rows
    central = trained(backbone, stage, config, head=head)
    averaged = federated(backbone, stage, config, shards, **head)
    assert largest_difference(averaged, central) < 1e-6
    start = toy_retriever(backbone).trainable_state()
    assert min(move(start, central, [name]) for name in differ(start, central)) > 1e-2
    even = sum(trained(backbone, stage, config, shard, head=head)["head.rows"] for shard in shards.values()) / 3
    assert float((even - central["head.rows"]).abs().max()) > 1e-4  # the weights n_i / n are needed
