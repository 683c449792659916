"""The bundled help desk from end to end: central and federated training, one table, three telling searches."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from caravan.app.comparison import Comparison
from caravan.app.experiment import save_result, start_comparison
from caravan.app.learning import Experiment
from caravan.config import Config, DataConfig
from caravan.data.dataset import Dataset
from caravan.model.retriever import Retriever
from caravan.storage import check_destination
from caravan.training.features import FeatureStore, default_cache
from caravan.training.progress import Report, prefixed

_ADAPTER_EPOCHS = 2  # half the default: the demonstration is to take less than four minutes on two cores


@dataclass(frozen=True)
class Search:
    """A query that ours answers with a gold document and MIPS does not."""

    query: str
    ours: str
    ours_title: str
    mips: str
    mips_title: str


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        comparison: BM25, MIPS, centroids, 1-NN, output adapter, head, adapter, federated adapter.
        searches: up to three queries, the surest first.
        won: test queries that ours answers first and MIPS does not.
        lost: the other way round.
    """

    comparison: Comparison
    searches: list[Search]
    won: int
    lost: int

    def searches_dict(self) -> dict[str, Any]:
        """The searches and counts as plain values."""
        return {"won": self.won, "lost": self.lost, "examples": [asdict(search) for search in self.searches]}


def run_demo(config: Config, out: str | Path, *, report: Report | None = None) -> DemoResult:
    """Train on `helpdesk` centrally and on its four sites, compare, and save the central retriever.

    Args:
        config: settings; data set, partition, rivals and at most two adapter epochs are the demonstration's own.
        out: folder of the saved retriever.
        report: called as the work goes on.

    Raises:
        CaravanError: see `Experiment`.
    """
    check_destination(out)
    sites = replace(config.federation, clients=0, partition="column", column="site")
    adapter = replace(config.training.adapter, epochs=min(config.training.adapter.epochs, _ADAPTER_EPOCHS))
    central = replace(
        config,
        data=DataConfig(path="helpdesk"),
        training=replace(config.training, adapter=adapter),
        federation=replace(config.federation, clients=0, partition="iid"),
        evaluation=replace(config.evaluation, baselines=True, random_backbone=False),
    )
    dataset = Dataset.from_config(central.data, seed=central.seed)
    store = FeatureStore(default_cache())
    experiment = Experiment(dataset, central, store=store, report=report)
    # Made now, run later: settings that clients refuse are to be known before the long work.
    federated = Experiment(
        dataset,
        replace(central, federation=sites),
        backbone=experiment.backbone,
        store=store,
        report=prefixed(report, "four sites: "),
    )
    comparison = start_comparison(experiment)
    retriever = experiment.run(
        lambda stage, trained, seconds: comparison.add_retriever(stage, trained, seconds=seconds)
    )
    trained = federated.run()
    comparison.add_retriever(f"federated {central.training.mode}", trained, seconds=trained.record["seconds"])
    save_result(retriever, comparison, out)
    return _telling(comparison, retriever, central.training.mode)


def _telling(comparison: Comparison, retriever: Retriever, ours_name: str) -> DemoResult:
    rows = {row.name: row.ranking for row in comparison.rows}
    ours, theirs = rows[ours_name], rows["MIPS"]
    right = [(ours.rows[query, 0] in gold, theirs.rows[query, 0] in gold) for query, gold in enumerate(comparison.gold)]
    won = [query for query, (we, they) in enumerate(right) if we and not they]
    probability = ours.probability if ours.probability is not None else ours.scores[:, 0]
    won.sort(key=lambda query: -float(probability[query]))
    searches = []
    for query in won[:3]:
        best = retriever.catalogue.document(int(ours.rows[query, 0]))
        other = retriever.catalogue.document(int(theirs.rows[query, 0]))
        searches.append(Search(comparison.texts[query], best.doc_id, best.title, other.doc_id, other.title))
    return DemoResult(comparison, searches, len(won), sum(they and not we for we, they in right))
