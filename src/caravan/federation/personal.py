"""A head of a client's own: between the shared one and one that it trained further, and it never leaves the client."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from caravan.config import TrainingConfig
from caravan.data.records import Example
from caravan.errors import DataError
from caravan.model.retriever import Retriever
from caravan.training.evaluation import measure, rank
from caravan.training.features import FeatureStore
from caravan.training.inputs import encode_with_progress
from caravan.training.progress import Report, prefixed
from caravan.training.trainer import fit, trained_parameters

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0 is the shared head: on its own held-out queries no client gets worse
HELD_OUT = 0.2  # of the client's queries: with fewer of them the choice is noise, with more the local head is
FEWEST = 10  # queries of different text: below, the two that choose say nothing
_NOTICE = (
    "Made personal on one client's own queries. Its head can reveal them to whoever holds it: keep it as private "
    "as they are."
)


@dataclass(frozen=True)
class Personal:
    """How a head became personal.

    Attributes:
        share: of the local head in the result; 0 leaves the shared head as it was.
        recalls: recall@1 on the held-out queries, by share.
        examples: queries that were trained on.
        held_out: queries that chose.
    """

    share: float
    recalls: dict[float, float]
    examples: int
    held_out: int


def personalise(
    retriever: Retriever,
    examples: Sequence[Example],
    training: TrainingConfig | None = None,
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 13,
    store: FeatureStore | None = None,
    report: Report | None = None,
) -> Personal:
    """Move the head of a federation's result towards one client's own queries, as far as that helps this client.

    A copy of the shared head theta is trained on the client's queries, which gives theta_i; the result is
    (1 - s) * theta + s * theta_i, tensor by tensor, with the share s that ranks the client's held-out queries best, of
    equals the smallest (a mixture as in Adaptive Personalized Federated Learning, arXiv:2003.13461, of weights as in
    arXiv:2109.01903). The adapter stays the shared one. Nothing is sent.

    Args:
        retriever: a federation's result; its head is changed in place, and so is its record: `personal` and `privacy`
            say what was done, and `metrics`, which were the shared head's, are gone.
        examples: the client's queries, at least `FEWEST` of different text; a fifth of them choose the share.
        training: settings of the head stage; the defaults if None.
        shares: to choose from, each from 0 to 1.
        seed: of the draw of held-out queries and of the order of the others.
        store: where vectors are kept; nowhere if None.
        report: called as the work goes on.

    Raises:
        DataError: there are too few queries, a share is out of range, or a gold document is not in the catalogue.
        TrainingError: the loss is no longer finite; the head is as it was.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise DataError(f"shares are {list(shares)}; give one or more numbers from 0 to 1")
    own, held_out = _hold_out(examples, seed)
    gold = [retriever.catalogue.gold_rows(example) for example in held_out]
    names = list(trained_parameters(retriever, "head"))
    state = retriever.trainable_state()
    shared = {name: state[name] for name in names}
    if not retriever.encoder.is_identity():
        store = None  # vectors of an adapted encoder are of no use to anybody later
    vectors = encode_with_progress(
        retriever.encoder, [example.text for example in held_out], store or FeatureStore(), report
    )
    try:
        fit(
            retriever,
            own,
            "head",
            training or TrainingConfig(),
            seed=seed,
            store=store,
            report=prefixed(report, "own head: "),
        )
        trained = retriever.trainable_state()
        recalls = {
            share: _recall(retriever, _mixed(shared, trained, share), vectors, gold) for share in sorted(set(shares))
        }
    except BaseException:
        retriever.load_trainable_state(shared, partial=True)
        raise
    best = max(recalls, key=lambda share: recalls[share])  # the first, that is smallest, of equals
    retriever.load_trainable_state(_mixed(shared, trained, best), partial=True)
    personal = Personal(best, recalls, len(own), len(held_out))
    values = asdict(personal)
    values["recalls"] = {f"{share:g}": recall for share, recall in recalls.items()}
    record = {name: value for name, value in retriever.record.items() if name not in ("metrics", "metrics_split")}
    privacy = " ".join(str(part) for part in (record.get("privacy"), _NOTICE) if part)
    retriever.record = {**record, "personal": values, "privacy": privacy}
    return personal


def _hold_out(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Part the queries at random, those of one text together.

    Not as `cut_validation` does, which gives away no document's last query: most of a shop's products it offers once,
    and the next offer is of yet another product.
    """
    texts = list(dict.fromkeys(example.text for example in examples))
    if len(texts) < FEWEST:
        raise DataError(
            f"{len(texts)} queries of different text are too few for a head of one's own; give {FEWEST} or more, or "
            "search with the shared one"
        )
    drawn = np.random.default_rng(seed).permutation(len(texts))[: max(1, round(HELD_OUT * len(texts)))]
    chosen = {texts[int(index)] for index in drawn}
    return (
        [example for example in examples if example.text not in chosen],
        [example for example in examples if example.text in chosen],
    )


def _mixed(shared: dict[str, Tensor], trained: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: torch.lerp(tensor, trained[name], share) for name, tensor in shared.items()}


@torch.no_grad()
def _recall(retriever: Retriever, head: dict[str, Tensor], vectors: Tensor, gold: list[list[int]]) -> float:
    retriever.load_trainable_state(head, partial=True)
    ranking = rank((retriever.head(part) for part in vectors.split(256)), logits=True)
    return measure(ranking, gold, bootstrap=0)["recall@1"].value
