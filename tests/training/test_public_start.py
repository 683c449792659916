import pytest

from caravan.data.records import Example
from caravan.errors import PrivacyError
from caravan.training.checkpoint import Checkpoint
from caravan.training.public_start import fit_privately, start_on_passages
from caravan.training.trainer import fit
from toy_privacy import Spent, private_steps
from toy_training import (
    EXAMPLES,
    LETTERS,
    Log,
    StoppedError,
    assert_same_bits,
    differ,
    toy_config,
    toy_retriever,
)

PASSAGES = [
    Example(" ".join(letters[start : start + 3]), (doc_id,))
    for doc_id, letters in LETTERS.items()
    for start in range(3)
]

both_stages = pytest.mark.parametrize("stage", ["head", "adapter"])


@both_stages
def test_passages_come_first_without_noise_and_the_queries_then_with_it(backbone, stage):
    config = toy_config(epochs=2)
    by_hand = toy_retriever(backbone)
    fit(by_hand, PASSAGES, stage, config, seed=3)
    fit(by_hand, EXAMPLES, stage, config, seed=3, privacy=private_steps(sigma=1.0, clip=1.0, batch=12))
    retriever, log, spent = toy_retriever(backbone), Log(), Spent()
    privacy = private_steps(sigma=1.0, clip=1.0, batch=12, spend=spent)
    history = fit_privately(retriever, EXAMPLES, stage, config, seed=3, privacy=privacy, passages=PASSAGES, report=log)
    assert_same_bits(retriever.trainable_state(), by_hand.trainable_state())
    assert [record.loss for record in history] == [None, None]
    assert spent.steps == [4, 4]  # passages cost nothing
    tasks = [progress.task for progress in log.told if "training" in progress.task]
    assert tasks == [f"passages: training the {stage}"] * 4 + [f"training the {stage}"] * 8


def test_without_passages_nothing_comes_first(backbone):
    retriever = toy_retriever(backbone)
    before = retriever.trainable_state()
    start_on_passages(retriever, [], "head", toy_config(), seed=0)
    assert not differ(before, retriever.trainable_state())


def test_what_cannot_be_private_is_refused_before_the_passages(backbone):
    log = Log()
    with pytest.raises(PrivacyError, match="class_weights"):
        fit_privately(
            toy_retriever(backbone),
            EXAMPLES,
            "head",
            toy_config(class_weights="sqrt"),
            seed=0,
            privacy=private_steps(),
            passages=PASSAGES,
            report=log,
        )
    assert log.told == []


def test_a_training_that_goes_on_does_not_start_on_passages_again(backbone, tmp_path):
    config = toy_config(epochs=2, checkpoint_seconds=1e-9)
    checkpoint = Checkpoint(tmp_path / "c.safetensors", "x")
    logs = [Log(), Log()]
    for number, log in enumerate(logs):
        if number == 0:
            log.stop_after = 6  # of the private part alone: its task has no prefix
        options = {"seed": 0, "privacy": private_steps(batch=12), "passages": PASSAGES, "checkpoint": checkpoint}
        try:
            fit_privately(toy_retriever(backbone), EXAMPLES, "head", config, report=log, **options)
        except StoppedError:
            assert number == 0
    assert any(progress.task.startswith("passages") for progress in logs[0].told)
    assert not any(progress.task.startswith("passages") for progress in logs[1].told)
    assert logs[1].steps[-1].done == 8
