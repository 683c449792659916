"""Training a retriever from settings and data: centrally, or on clients that do not pool their queries."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from caravan.app.comparison import rank_queries
from caravan.app.guarantee import plan_central_noise, plan_privacy, steps_are_private
from caravan.app.rate import settle_rates
from caravan.app.record import privacy_statement, run_fingerprint, shown_settings, training_record
from caravan.app.separation import check_separation
from caravan.app.standing import Standing
from caravan.app.start import starting_rows
from caravan.app.traces import STAGES, Traces, point_of_epoch, point_of_round
from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.data.partition import Shard, partition
from caravan.data.passages import document_passages
from caravan.federation.local import Part, train_client, trained_names
from caravan.federation.quorum import check_settings
from caravan.federation.rounds import RoundReport, Update
from caravan.federation.strategies import Strategy, proximal_mu
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.encoder import Encoder
from caravan.model.retriever import Retriever
from caravan.training.budget import Budget
from caravan.training.evaluation import measure
from caravan.training.features import FeatureStore, default_cache
from caravan.training.inputs import encode_with_progress
from caravan.training.progress import Report
from caravan.training.public_start import start_on_passages
from caravan.training.trainer import Stage, fit

OnStage = Callable[[Stage, Retriever, float], object]
OnRound = Callable[[RoundReport, dict[str, Tensor]], None]


class Experiment:
    """One training of one retriever on one data set.

    Attributes:
        dataset: the words.
        config: all settings.
        shards: the clients' examples; none for central training.
        passages: what documents say of themselves, trained on like queries; client i of k takes every k-th from i on.
        budgets: of a private training, by client, or "" for central training; none of another.
        backbone: the frozen model, loaded once.
        settled: the settings, with numbers for those rates that were "auto" in the stages begun so far.
        retriever: untrained until `run` is called.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config | None = None,
        *,
        backbone: Backbone | None = None,
        store: FeatureStore | None = None,
        report: Report | None = None,
        checkpoint: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        """Prepare a training.

        Args:
            dataset: catalogue and examples.
            config: settings; the defaults if None. Its `data` part only names where `dataset` came from.
            backbone: an already loaded frozen model that fits `config.backbone`.
            store: where vectors are kept; the user's cache folder if None.
            report: called as the work goes on.
            checkpoint: a folder for snapshots; None keeps none.
            resume: take up the snapshots found there; otherwise they are removed.
        """
        self.dataset, self.config = dataset, config or Config()
        self.store = store or FeatureStore(default_cache())
        self.traces = Traces(checkpoint, lambda: run_fingerprint(dataset, self.config, self.backbone.hash))
        self.report = self.traces.watching(report)
        # What can be refused is refused before the first long work, and before an earlier run's snapshots go.
        self.shards = self._deal()
        self.passages = document_passages(dataset.catalogue, self.config.training.passages)
        self.budgets = self._plan_privacy()
        self.central_noise = plan_central_noise(self.config, self._client_count, self.stages)
        self.backbone = backbone or load_backbone(self.config.backbone, seed=self.config.seed)
        self.settled = self.config
        if resume:
            self.traces.check(self.stages)
        self.retriever = self._start()
        if not resume:
            self.traces.clear()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is trained, in order."""
        return STAGES if self.config.training.mode == "adapter" else ("head",)

    @property
    def federated(self) -> bool:
        """Whether the settings ask for clients."""
        return self.config.federation.clients > 0 or self.config.federation.partition == "column"

    def run(self, on_stage: OnStage | None = None) -> Retriever:
        """Train, and fill the retriever's record.

        Args:
            on_stage: called after each stage with its name, the retriever as it stands, and the seconds so far.

        Raises:
            FederationError: a round had no usable client.
            TrainingError: there is nothing to learn from, or the loss diverged.
            StorageError: a snapshot cannot be written or trusted.
        """
        self._check_budgets()
        with self.traces.running(self._beginning):
            return self._run(on_stage)

    def _run(self, on_stage: OnStage | None) -> Retriever:
        history: list[dict[str, Any]] = []
        rounds: list[dict[str, Any]] = []
        kept: dict[str, int] = {}
        rates: dict[str, dict[str, Any]] = {}
        seconds = 0.0
        for stage in self.stages:
            started = time.perf_counter()
            rates |= self._settle_rates(stage)
            self._start_publicly(stage)
            if self.federated:
                standing = self._federate(stage)
                rounds.extend(standing.rounds)
                kept[stage] = standing.kept[0]
            else:
                history.extend(self._train(stage))
            seconds += time.perf_counter() - started
            if on_stage is not None:
                on_stage(stage, self.retriever, seconds)
        self.retriever.record = training_record(
            self.dataset,
            self.config,
            self.backbone,
            passages=len(self.passages),
            history=history,
            seconds=seconds,
            budgets=self.budgets,
            central_noise=self.central_noise,
            rates=rates,
        )
        if self.federated:
            federation = {"clients": self._clients(rounds), "rounds": rounds, "kept_rounds": kept}
            self.retriever.record["federation"] = federation
        return self.retriever

    def clear_checkpoint(self) -> None:
        """Remove the snapshots, once the result is saved."""
        self.traces.clear(folder=True)

    def _deal(self) -> list[Shard]:
        """The clients' examples, none for central training."""
        if not self.federated:
            return []
        check_separation(self.config, validation=bool(self.dataset.validation))
        shards = partition(self.dataset.train, self.config.federation, seed=self.config.seed)
        check_settings(self.config.federation, len(shards))
        return shards

    @property
    def _client_count(self) -> int:
        return len(self.shards)

    def _plan_privacy(self) -> dict[str, Budget]:
        """The owners' budgets, none without privacy."""
        owners = {shard.name: shard.examples for shard in self.shards} or {"": self.dataset.train}
        return plan_privacy(self.config, owners, self.stages)

    def _check_budgets(self) -> None:
        """Refuse before the first step what a cap would stop later; what a resumed training has done is spent."""
        ahead = [stage for stage in self.stages if self._is_ahead(stage)]
        for budget in self.budgets.values():
            budget.check(ahead)

    def _is_ahead(self, stage: Stage) -> bool:
        snapshots = self.traces.snapshots(stage)
        return snapshots is None or snapshots.load() is None

    def _settle_rates(self, stage: Stage) -> dict[str, dict[str, Any]]:
        """Put numbers in place of "auto", and say how by stage; of a federation on passages alone."""
        self.settled, record = settle_rates(
            self.settled,
            stage,
            self.retriever,
            self.dataset,
            self.passages,
            train=None if self.federated else self._anew,
            store=self.store,
            report=self.report,
            kept=self.traces.snapshots(stage, ".rate"),
        )
        return {stage: record} if record else {}

    def _anew(self, dataset: Dataset, config: Config, store: FeatureStore, report: Report | None) -> Retriever:
        return Experiment(dataset, config, backbone=self.backbone, store=store, report=report).run()

    def _start_publicly(self, stage: Stage) -> None:
        """Train a private training's stage on passages first: documents are public, and cost no privacy."""
        if steps_are_private(self.config) and self._is_ahead(stage):
            start_on_passages(
                self.retriever,
                self.passages,
                stage,
                self.settled.training,
                seed=self.config.seed,
                store=self.store,
                report=self.report,
            )

    def _train(self, stage: Stage) -> list[dict[str, Any]]:
        records = fit(
            self.retriever,
            self.dataset.train,
            stage,
            self.settled.training,
            seed=self.config.seed,
            passages=() if self.budgets else self.passages,
            validation=self.dataset.validation,
            store=self.store,
            report=self.report,
            on_epoch=lambda epoch: self.traces.add(point_of_epoch(asdict(epoch), self.config.to_dict())),
            checkpoint=self.traces.snapshots(stage),
            privacy=self.budgets[""].steps(stage) if self.budgets else None,
        )
        return [asdict(record) for record in records]

    def _federate(self, stage: Stage) -> Standing:
        federation, rounds, state = self.config.federation, self._rounds(stage), self.retriever.trainable_state()
        standing = Standing({name: state[name] for name in trained_names(self.retriever, stage)})
        if not rounds:
            return standing
        snapshots = self.traces.snapshots(stage)
        if snapshots is not None and (snapshot := snapshots.load()) is not None:
            standing = Standing.from_snapshot(snapshot)
        strategy = Strategy(federation, self.central_noise)
        strategy.restore(standing.server)

        def on_round(report: RoundReport, averaged: dict[str, Tensor]) -> None:
            self.retriever.load_trainable_state(averaged, partial=True)
            recall = self._validation_recall()
            standing.tensors, standing.server, standing.round = averaged, strategy.state(), report.round
            spent = self._spent(stage, report)
            standing.rounds.append({"stage": stage, **asdict(report), "validation_recall": recall, "epsilon": spent})
            if federation.keep == "best" and recall is not None:
                standing.offer(recall)
            if snapshots is not None:
                snapshots.save(standing.snapshot())
            self.traces.add(point_of_round(standing.rounds[-1], self.config.to_dict()))
            self._tell(standing.rounds[-1], rounds)

        self._run_rounds(stage, standing, rounds, strategy, on_round)
        self.retriever.load_trainable_state(standing.kept[1], partial=True)
        return standing

    def _rounds(self, stage: Stage) -> int:
        return min(self.config.federation.rounds, getattr(self.config.training, stage).epochs)

    def _spent(self, stage: Stage, report: RoundReport) -> float | None:
        """The epsilon of whoever has spent most by the end of a round, of those who say; None without privacy."""
        if self.central_noise is not None:
            before = self.stages[: self.stages.index(stage)]
            return self.central_noise.spent(sum(map(self._rounds, before)) + report.round)
        told = [budget.spent for budget in self.budgets.values()]
        told += [metrics.get("epsilon") for metrics in report.metrics]
        return max((value for value in told if value is not None), default=None)

    def _beginning(self) -> dict[str, Any]:
        """What is known of a training before its first step."""
        settings = shown_settings(self.config.to_dict(), self.dataset.name, len(self.dataset.catalogue))
        return {"settings": settings, "privacy": privacy_statement(self.config, self.budgets, self.central_noise)}

    def _run_rounds(self, stage: Stage, standing: Standing, rounds: int, strategy: Strategy, on_round: OnRound) -> None:
        """Run what is left of a stage's rounds, on clients that are simulated here."""
        from caravan.federation.flower import run_federation

        shard_of = {shard.name: (place, shard) for place, shard in enumerate(self.shards)}

        def local_train(client: str, received: dict[str, Tensor], number: int) -> Update:
            place, shard = shard_of[client]
            return self._train_client(shard, received, Part(stage, number, rounds, place, len(self.shards)))

        run_federation(
            standing.tensors,
            list(shard_of),
            local_train,
            rounds=rounds,
            settings=self.config.federation,
            seed=self.config.seed,
            first_round=standing.round + 1,
            strategy=strategy,
            on_round=on_round,
        )

    def _train_client(self, shard: Shard, received: dict[str, Tensor], part: Part) -> Update:
        return train_client(
            self.retriever,
            shard.name,
            shard.examples,
            self.settled,
            received,
            part=part,
            passages=self.passages,
            proximal_mu=proximal_mu(self.config.federation),
            store=self.store,
            report=self.report,
            privacy=self.budgets[shard.name].steps(part.stage) if self.budgets else None,
        )

    def _validation_recall(self) -> float | None:
        if not self.dataset.validation:
            return None
        ranking = rank_queries(self.retriever, [example.text for example in self.dataset.validation], self.store)
        return measure(ranking, self._validation_gold, bootstrap=0)["recall@1"].value

    @cached_property
    def _validation_gold(self) -> list[list[int]]:
        return [self.dataset.catalogue.gold_rows(example) for example in self.dataset.validation]

    def _start(self) -> Retriever:
        """The untrained retriever: document vectors as rows or, centrally, class centroids where these rank better."""
        rows = starting_rows(self.dataset, self.config, self.backbone, self._vectors, federated=self.federated)
        adapter, head = self.config.adapter, self.config.head
        return Retriever.start(self.backbone, self.dataset.catalogue, rows, adapter=adapter, head=head)

    def _vectors(self, encoder: Encoder, texts: Sequence[str], what: str) -> Tensor:
        return encode_with_progress(encoder, texts, self.store, self.report, task=f"encoding {what}")

    def _tell(self, report: dict[str, Any], rounds: int) -> None:
        """Say what a round did; the simulation's bars have said it."""

    def _clients(self, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Who took part, for the record."""
        del rounds
        return [{"name": shard.name, "examples": len(shard.examples)} for shard in self.shards]


def train(
    dataset: Dataset,
    config: Config | None = None,
    *,
    report: Report | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Retriever:
    """Train a retriever on one machine: the head, then (mode "adapter") adapter and head together.

    Args:
        dataset: catalogue and examples.
        config: settings; the defaults if None. Settings of `federation` are not looked at.
        report: called as the work goes on.
        checkpoint: a folder for snapshots; None keeps none.
        resume: take up the snapshots found there.

    Returns:
        The trained retriever; `record` says how it came about.

    Raises:
        CaravanError: see `Experiment`.
    """
    config = config or Config()
    central = replace(config, federation=replace(config.federation, clients=0, partition="iid"))
    return Experiment(dataset, central, report=report, checkpoint=checkpoint, resume=resume).run()


def federate(
    dataset: Dataset,
    config: Config | None = None,
    *,
    report: Report | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Retriever:
    """Train a retriever on clients that keep their queries, in simulation on this machine (FedAvg; arXiv:1602.05629).

    Args:
        dataset: its training examples are dealt to clients as `config.federation` says.
        config: settings; with None, or with neither clients nor a column named, three clients dealt at random.
        report: called as the work goes on.
        checkpoint: a folder for snapshots; None keeps none.
        resume: take up the snapshots found there.

    Returns:
        The trained retriever; `record["federation"]` lists clients and rounds.

    Raises:
        CaravanError: see `Experiment`.
    """
    config = config or Config()
    if config.federation.clients == 0 and config.federation.partition != "column":
        config = replace(config, federation=replace(config.federation, clients=3))
    return Experiment(dataset, config, report=report, checkpoint=checkpoint, resume=resume).run()
