"""One client's work of one round: the same in simulation and on a node of a real federation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from caravan.config import Config
from caravan.data.records import Example
from caravan.federation.rounds import Update
from caravan.model.retriever import Retriever
from caravan.training.features import FeatureStore
from caravan.training.private import PrivateSteps
from caravan.training.progress import Report, prefixed
from caravan.training.trainer import Stage, fit, trained_parameters
from caravan.training.vitals import round_metrics


@dataclass(frozen=True)
class Part:
    """Which part of a federated training is one client's work of one round.

    Attributes:
        stage: what is trained.
        number: the round, 1 for the first.
        rounds: the stage's rounds.
        place: the client's place among all, from 0: it decides the order of examples and the share of passages.
        clients: how many there are.
    """

    stage: Stage
    number: int
    rounds: int
    place: int
    clients: int


def trained_names(retriever: Retriever, stage: Stage) -> list[str]:
    """The names of the tensors that a stage trains and sends."""
    return list(trained_parameters(retriever, stage))


def train_client(
    retriever: Retriever,
    client: str,
    examples: Sequence[Example],
    config: Config,
    received: Mapping[str, Tensor],
    *,
    part: Part,
    passages: Sequence[Example],
    proximal_mu: float,
    store: FeatureStore,
    report: Report | None = None,
    privacy: PrivateSteps | None = None,
) -> Update:
    """Train on one client's examples for one round.

    A private client's update weighs 1, whatever it has: how many examples that is, is nobody's business; and the
    passages are not its to train on, since those of a private training come first and by themselves. The update's
    metrics are those of `EpochRecord`, for which it is None of what is private; what leaves a node of them is up to its
    operator.

    Args:
        retriever: of the same form as the server's; changed in place.
        client: the client's name.
        examples: its queries.
        config: seed and training settings.
        received: the global tensors that the stage trains.
        part: which round of which stage.
        passages: what the documents say of themselves; the client takes its share of it.
        proximal_mu: how strongly it is held to the received tensors.
        store: where vectors are kept.
        report: called as the work goes on.
        privacy: how the client's guarantee is kept.

    Raises:
        PrivacyError: its budget is spent, or a setting does not go with it.
        TrainingError: there is no example, or the loss is no longer finite.
        StorageError: the received tensors do not fit the retriever.
    """
    epochs, number, rounds = getattr(config.training, part.stage).epochs, part.number, part.rounds
    retriever.load_trainable_state(received, partial=True)
    records = fit(
        retriever,
        examples,
        part.stage,
        config.training,
        seed=config.seed + part.place,
        passages=() if privacy else passages[part.place :: part.clients],
        epochs=range((number - 1) * epochs // rounds, number * epochs // rounds),
        store=store,
        report=prefixed(report, f"round {number}/{rounds}, {client}: "),
        proximal_mu=proximal_mu,
        privacy=privacy,
    )
    trained = retriever.trainable_state()
    tensors = {name: trained[name] for name in trained_names(retriever, part.stage)}
    # Whole clients are hidden by the server's noise, which covers tensors alone: no number may go beside them.
    metrics = {} if config.privacy.mode == "client-level" else round_metrics(records)
    return Update(client, tensors, 1 if privacy else len(examples), metrics)
