"""The rows that an untrained head begins with: vectors of documents, or class centroids where these rank better."""

from collections.abc import Callable, Sequence

from torch import Tensor

from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import Backbone
from caravan.model.encoder import Encoder
from caravan.training.baselines import class_centroids, mips
from caravan.training.evaluation import measure

Vectors = Callable[[Encoder, Sequence[str], str], Tensor]


def starting_rows(dataset: Dataset, config: Config, backbone: Backbone, vectors: Vectors, *, federated: bool) -> Tensor:
    """Make the rows of an untrained head, float32 (C, H).

    Args:
        dataset: catalogue and examples.
        config: `head.start` decides; "auto" asks the validation queries, but takes the documents where there are none,
            and where clients or privacy keep training queries from being pooled.
        backbone: the frozen model.
        vectors: encodes texts; its last argument says what they are.
        federated: whether clients train.
    """
    catalogue = dataset.catalogue
    encoder = Encoder(backbone, IdentityAdapter(backbone.embedding_width))
    rows = vectors(encoder, [document.content for document in catalogue], "documents")
    start = config.head.start
    apart = federated or config.privacy.mode != "none"
    choose = start == "auto" and not apart and len(dataset.validation) > 0
    if start != "centroids" and not choose:
        return rows
    train = vectors(encoder, [example.text for example in dataset.train], "training queries")
    gold = [catalogue.gold_rows(example) for example in dataset.train]
    centres = class_centroids(train, gold, rows)
    if start == "centroids":
        return centres
    queries = vectors(encoder, [example.text for example in dataset.validation], "validation queries")
    asked = [catalogue.gold_rows(example) for example in dataset.validation]
    first, second = (measure(mips(queries, each), asked, bootstrap=0)["recall@1"].value for each in (centres, rows))
    return centres if first > second else rows
