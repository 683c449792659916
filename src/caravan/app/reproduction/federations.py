"""Trainings as experiments need them: clients that are timed, clients that are away, and differences in pairs."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from caravan.app.comparison import rank_queries
from caravan.app.learning import Experiment
from caravan.app.reproduction.frame import Bench
from caravan.app.reproduction.trials import figures
from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.data.partition import Shard
from caravan.data.records import Example
from caravan.errors import FederationError
from caravan.federation.local import Part
from caravan.federation.rounds import Update
from caravan.model.retriever import Retriever
from caravan.training.features import FeatureStore
from caravan.training.trainer import Stage

_AWAY = "away in this round"
_Point = TypeVar("_Point")
Away = Callable[[int, int], bool]  # of a client's place and a round's number, both as in `Part`


class Simulation(Experiment):
    """A training whose clients are timed, and may miss rounds.

    Attributes:
        away: says which client misses which round; None: nobody misses any.
        local_seconds: of each client's work, by stage and round.
    """

    away: Away | None = None
    local_seconds: dict[tuple[str, int], list[float]]  # given by `simulate`

    def _train_client(self, shard: Shard, received: dict[str, Tensor], part: Part) -> Update:
        if self.away is not None and self.away(part.place, part.number):
            raise FederationError(_AWAY)
        started = time.perf_counter()
        update = super()._train_client(shard, received, part)  # its tensors are on the CPU: a GPU's work is done
        self.local_seconds.setdefault((part.stage, part.number), []).append(time.perf_counter() - started)
        return update


def simulate(
    bench: Bench,
    dataset: Dataset,
    config: Config,
    what: str,
    *,
    away: Away | None = None,
    cold: bool = False,
) -> dict[str, Any]:
    """Train once, centrally or on clients as the settings say, and rank the test queries after each stage.

    Args:
        bench: whose work it is.
        dataset: catalogue, train, test, and validation where rounds are to be scored.
        config: all settings.
        what: said while it goes on.
        away: which client misses which round.
        cold: keep no vector from before, so that the seconds hold the encoding of the queries.

    Returns:
        By stage: `figures` of the test queries, "hits" (see `packed`), "seconds" of the stage, and of a federation its
        "rounds" (see `_round`); beside them "curve", pairs of epochs or rounds done and validation recall over all
        stages, and of a private training "guarantees", as in the retriever's record.

    Raises:
        CaravanError: see `Experiment`.
        FederationError: a client that was there failed.
    """
    with TemporaryDirectory() if cold else nullcontext() as folder:
        store = bench.store if folder is None else FeatureStore(folder)
        experiment = Simulation(dataset, config, backbone=bench.model, store=store, report=bench.telling(what))
        experiment.away, experiment.local_seconds = away, {}
        return _run(bench, experiment)


def _run(bench: Bench, experiment: Simulation) -> dict[str, Any]:
    result: dict[str, Any] = {}
    before = 0.0

    def on_stage(stage: Stage, retriever: Retriever, seconds: float) -> None:
        nonlocal before
        result[stage] = {**ranked(bench, retriever, experiment.dataset.test), "seconds": round(seconds - before, 4)}
        before = seconds

    record = experiment.run(on_stage).record
    if experiment.federated:
        rounds = record["federation"]["rounds"]
        for stage in experiment.stages:
            own = [report for report in rounds if report["stage"] == stage]
            local = [experiment.local_seconds.get((stage, report["round"]), []) for report in own]
            result[stage]["rounds"] = [_round(report, seconds) for report, seconds in zip(own, local, strict=True)]
        result["curve"] = [[number, report["validation_recall"]] for number, report in enumerate(rounds, start=1)]
    else:
        history = record["history"]
        result["curve"] = [[number, epoch["validation_recall"]] for number, epoch in enumerate(history, start=1)]
    return result | ({"guarantees": record["guarantees"]} if "guarantees" in record else {})


def _round(report: Mapping[str, Any], local: Sequence[float]) -> dict[str, Any]:
    """A round as kept: clients asked and missing, bytes, seconds of each client, of the server, and validation.

    Raises:
        FederationError: a client failed that was there: what the others came to is no result.
    """
    for failure in report["failures"]:
        if not failure["reason"].endswith(_AWAY):
            where = f"round {report['round']}, {failure['client']}"
            raise FederationError(f"{where}: {failure['reason']}; repair it and start the experiment again")
    return {
        "asked": len(report["asked"]),
        "missing": len(report["failures"]),
        "bytes_up": report["bytes_up"],
        "bytes_down": report["bytes_down"],
        "local": [round(seconds, 4) for seconds in local],
        "server": round(max(0.0, report["seconds"] - sum(local)), 4),
        "validation_recall": report["validation_recall"],
    }


def ranked(bench: Bench, retriever: Retriever, examples: Sequence[Example]) -> dict[str, Any]:
    """`figures` of queries without intervals, and "hits": which have a right document first, as `packed`."""
    ranking = rank_queries(retriever, [example.text for example in examples], bench.store, bench.report)
    gold = [retriever.catalogue.gold_rows(example) for example in examples]
    hits = [row in rows for row, rows in zip(ranking.rows[:, 0].tolist(), gold, strict=True)]
    return {**figures(ranking, gold, bootstrap=0), "hits": packed(hits)}


def packed(hits: Sequence[bool]) -> dict[str, Any]:
    """Whether each of Q queries was answered rightly, eight to a byte, so that differences can be paired later."""
    return {"queries": len(hits), "bits": np.packbits(np.array(hits, dtype=bool)).tobytes().hex()}


def unpacked(hits: Mapping[str, Any]) -> np.ndarray:
    """What `packed` took, as float64 (Q,) of 0 and 1."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(hits["bits"]), dtype=np.uint8))
    return bits[: hits["queries"]].astype(np.float64)


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """How many points of recall@1 the first ones are above the second, with a 95% interval.

    Args:
        ours: `packed` hits on the same Q queries, one a seed.
        theirs: likewise, of the same seeds in the same order.

    Returns:
        The mean over queries of each query's mean over seeds, in points, and 1.96 standard errors (over queries) below
        and above it: pairs of the same query, so what makes a query hard for both does not widen it.
    """
    pairs = zip(ours, theirs, strict=True)
    each = 100 * np.mean([unpacked(first) - unpacked(second) for first, second in pairs], axis=0)
    mean = float(each.mean())
    reach = 1.96 * float(each.std(ddof=1)) / len(each) ** 0.5 if len(each) > 1 else 0.0
    return mean, mean - reach, mean + reach


def settled(low: float, high: float, bound: float) -> str:
    """Say whether an interval lets a verdict on a bound be more than a guess."""
    if low <= bound <= high:
        return f"The interval holds {bound:g}, so these test queries do not settle it."
    return f"The interval is all on one side of {bound:g}."


def thinned(points: Sequence[_Point], most: int = 20) -> list[_Point]:
    """Keep so few of a curve's points that their marks can be told apart: every n-th, counted from the last."""
    step = -(-len(points) // most)
    return list(points[::-1][::step][::-1]) if points else []
