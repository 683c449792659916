"""Bytes beside recall: what a federated round sends by each method, and how well that ranks when it is trained."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal, cast

from torch import Tensor

from caravan.app.comparison import Comparison, evaluation_split
from caravan.app.learning import Experiment
from caravan.app.payload import RIVALS, Method, Payload, payloads, skeletons
from caravan.app.rivals import RivalExperiment
from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.errors import ConfigError
from caravan.model.backbone import Backbone, load_backbone
from caravan.training.evaluation import Estimate
from caravan.training.features import FeatureStore, default_cache
from caravan.training.progress import Report, prefixed

SentCodec = Literal["none", "int8"]  # "none" sends float32 numbers

_CLIENTS = 3  # where the settings name none, as in `federate`

# In the order in which they are trained: what says most first.
TRAININGS: tuple[tuple[Method, SentCodec], ...] = (
    ("full", "none"),
    ("lora-qv", "none"),
    ("core", "none"),
    ("core", "int8"),
    ("full", "int8"),
    ("lowrank", "none"),
    ("lowrank", "int8"),
    ("fine-tuning", "none"),
    ("lora-all", "none"),
)


@dataclass(frozen=True)
class Trained:
    """What became of one method's training.

    Attributes:
        method: what was trained beside the head.
        codec: how the clients packed it.
        recall: recall@1 on the evaluation split.
        up: bytes that one client sent in a round of the adapter stage, on average, as serialised.
        down: bytes that it received, likewise.
        rounds: of that stage.
        seconds: of that stage.
    """

    method: Method
    codec: SentCodec
    recall: Estimate
    up: int
    down: int
    rounds: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Communication:
    """All methods on one data set, with the same clients, rounds, epochs and head stage.

    Attributes:
        dataset: the words; its catalogue decides the head's size.
        config: settings, with clients, of a training with an adapter in float32.
        skeletons: the backbone at hand, then larger ones.
    """

    def __init__(
        self, dataset: Dataset, config: Config, *, store: FeatureStore | None = None, report: Report | None = None
    ) -> None:
        """Count, without training.

        Args:
            dataset: catalogue and examples.
            config: settings. Without clients there will be three; adapter kind and codec are each method's own, and
                rivals have learning rates of their own.
            store: where vectors are kept; the user's cache folder if None.
            report: called as the work goes on.

        Raises:
            BackboneError: there is no such backbone.
        """
        self.dataset, self.report = dataset, report
        self.store = store or FeatureStore(default_cache())
        federation = config.federation
        if not federation.clients and federation.partition != "column":
            federation = replace(federation, clients=_CLIENTS)
        # Weights that are trained are float32, so all blocks are: the same arithmetic for everybody.
        training = replace(config.training, mode="adapter", precision="float32")
        self.config = replace(config, federation=federation, training=training)
        self.skeletons = skeletons(config.backbone)
        self._heads: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def tables(self) -> dict[str, list[Payload]]:
        """What is sent, by model."""
        count = len(self.dataset.catalogue)
        return {
            skeleton.name: payloads(skeleton, self.config.adapter, self.config.head, count)
            for skeleton in self.skeletons
        }

    def trainings(self) -> Iterator[tuple[Method, SentCodec]]:
        """What can be trained here: without peft, or without layers that it fits, no LoRA."""
        counted = {row.method for row in self.tables[self.skeletons[0].name]}
        for method, codec in TRAININGS:
            if method in counted and (self.has_peft or not method.startswith("lora")):
                yield method, codec

    @property
    def has_peft(self) -> bool:
        """Whether LoRAs can be trained."""
        return find_spec("peft") is not None

    def train(self, method: Method, codec: SentCodec) -> Trained:
        """Train by one method, and rank the evaluation split once.

        Raises:
            ConfigError: the backbone is not in float32, or a LoRA was asked for without peft.
            CaravanError: see `Experiment`.
        """
        self.check()
        report = prefixed(self.report, f"{method}, {codec}: ")
        config = self._settings(codec, head_epochs=0)
        if method in RIVALS:
            experiment: Experiment = RivalExperiment(
                self.dataset, config, method, backbone=self.backbone, store=self.store, report=report
            )
        else:
            kind = cast(Literal["full", "lowrank", "core"], method)
            config = replace(config, adapter=replace(config.adapter, kind=kind))
            experiment = Experiment(self.dataset, config, backbone=self.backbone, store=self.store, report=report)
        experiment.retriever.load_trainable_state(self._head(codec), partial=True)
        retriever = experiment.run()
        row = Comparison(self.dataset, config, store=self.store, report=report).add_retriever(method, retriever)
        record = retriever.record
        rounds: Sequence[Mapping[str, Any]] = record["federation"]["rounds"]
        messages = sum(len(one["asked"]) for one in rounds) or 1
        up, down = (sum(one[way] for one in rounds) // messages for way in ("bytes_up", "bytes_down"))
        return Trained(method, codec, row.metrics["recall@1"], up, down, len(rounds), record["seconds"])

    def check(self) -> None:
        """Refuse what cannot be trained, before anything is.

        Raises:
            ConfigError: the backbone is not in float32.
            DataError: there are no held-out queries.
        """
        if self.config.backbone.dtype != "float32":
            raise ConfigError(
                f"backbone.dtype = {self.config.backbone.dtype}: LoRA and fine-tuning train weights of the backbone, "
                f'which takes float32; set it to "float32"'
            )
        evaluation_split(self.dataset)

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model, loaded once; rivals copy it."""
        return load_backbone(self.config.backbone, seed=self.config.seed)

    def _head(self, codec: SentCodec) -> dict[str, Tensor]:
        """The head after its own stage, which is the same whatever is trained in the next."""
        if codec not in self._heads:
            config = self._settings(codec, head_epochs=self.config.training.head.epochs)
            config = replace(config, training=replace(config.training, mode="head"))
            config = replace(config, adapter=replace(config.adapter, kind="none"))
            report = prefixed(self.report, f"head, {codec}: ")
            experiment = Experiment(self.dataset, config, backbone=self.backbone, store=self.store, report=report)
            self._heads[codec] = experiment.run().trainable_state()
        return self._heads[codec]

    def _settings(self, codec: SentCodec, *, head_epochs: int) -> Config:
        training = self.config.training
        return replace(
            self.config,
            federation=replace(self.config.federation, codec=codec),
            training=replace(training, head=replace(training.head, epochs=head_epochs)),
        )

    def summary(self, trained: Sequence[Trained] = ()) -> dict[str, Any]:
        """All as plain values: what `--json` prints."""
        federation, stage = self.config.federation, self.config.training.adapter
        models = [
            {
                "model": skeleton.name,
                "numbers": skeleton.numbers,
                "rows": [row.to_dict() for row in self.tables[skeleton.name]],
            }
            for skeleton in self.skeletons
        ]
        content: dict[str, Any] = {
            "dataset": self.dataset.name,
            "documents": len(self.dataset.catalogue),
            "models": models,
        }
        if trained:
            content["trained"] = {
                "split": evaluation_split(self.dataset)[0],
                "clients": federation.clients or None,
                "rounds": trained[0].rounds,
                "epochs": stage.epochs,
                "seed": self.config.seed,
                "rows": [row.to_dict() for row in trained],
            }
        return content
