"""What validation does to a training: nothing, unless patience is set."""

from dataclasses import replace

import pytest

from caravan.data.records import Example
from caravan.training.trainer import fit
from toy_training import (
    CATALOGUE,
    EXAMPLES,
    VALIDATION,
    Log,
    assert_same_bits,
    toy_config,
    toy_retriever,
    trained,
)

both_stages = pytest.mark.parametrize("stage", ["head", "adapter"])


def epoch_states(backbone, stage, config, **options):
    """The history of a training, and the state at the end of each epoch, seen from outside."""
    retriever, states = toy_retriever(backbone), []

    def watch(progress):
        steps = progress.total // config.head.epochs
        if progress.task.startswith("training") and progress.done % steps == 0:
            states.append(retriever.trainable_state())

    return fit(retriever, EXAMPLES, stage, config, seed=0, report=watch, **options), states


@both_stages
def test_a_validation_set_is_only_looked_at_when_patience_is_0(backbone, stage):
    config = toy_config()
    assert_same_bits(trained(backbone, stage, config), trained(backbone, stage, config, validation=VALIDATION))


@both_stages
@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_keeps_the_best_epochs_state(backbone, stage, patience):
    # Validation asks for what training untrains: its queries want the document after the one they resemble.
    config = toy_config(epochs=6, rate=0.02)
    wanted = {"d0": "d1", "d1": "d2", "d2": "d3", "d3": "d0"}
    validation = [replace(example, doc_ids=(wanted[example.doc_ids[0]],)) for example in VALIDATION]
    history, states = epoch_states(backbone, stage, config, validation=validation)
    recalls = [record.validation_recall for record in history]
    best = 0
    for epoch, value in enumerate(recalls):
        if value > recalls[best]:
            best = epoch
        if epoch - best == patience:
            break
    assert epoch < 5, f"no early stop in {recalls}: the test is to be made harder"

    retriever, log = toy_retriever(backbone), Log()
    stopped = fit(
        retriever, EXAMPLES, stage, replace(config, patience=patience), seed=0, validation=validation, report=log
    )
    assert [record.validation_recall for record in stopped] == recalls[: epoch + 1]
    assert_same_bits(retriever.trainable_state(), states[best])
    assert log.steps[-1].done == log.steps[-1].total


def test_patience_that_is_never_lost_still_keeps_the_best_epoch(backbone):
    config = toy_config(epochs=6, rate=0.05)
    history, states = epoch_states(backbone, "head", config, validation=VALIDATION)
    recalls = [record.validation_recall for record in history]
    kept = trained(backbone, "head", replace(config, patience=6), validation=VALIDATION)
    assert_same_bits(kept, states[recalls.index(max(recalls))])


def test_of_equally_good_epochs_the_first_is_kept(backbone):
    config = toy_config(epochs=4)
    validation = [replace(example, doc_ids=("d4",)) for example in VALIDATION]  # never found
    history, states = epoch_states(backbone, "head", config, validation=validation)
    assert {record.validation_recall for record in history} == {0.0}
    assert_same_bits(trained(backbone, "head", replace(config, patience=2), validation=validation), states[0])


def test_patience_without_validation_trains_to_the_end(backbone):
    assert_same_bits(
        trained(backbone, "head", toy_config(patience=1)), trained(backbone, "head", toy_config(patience=0))
    )


def test_a_validation_query_counts_when_its_first_hit_is_any_of_its_documents(backbone):
    retriever = toy_retriever(backbone)
    first = retriever.search("a b", 1)[0].doc_id
    others = tuple(doc_id for doc_id in CATALOGUE.ids if doc_id != first)
    validation = [Example("a b", (others[0], first)), Example("a b", (first,)), Example("a b", others)]
    (record,) = fit(retriever, EXAMPLES, "head", toy_config(epochs=1, rate=1e-9), seed=0, validation=validation)
    assert record.validation_recall == pytest.approx(2 / 3)
