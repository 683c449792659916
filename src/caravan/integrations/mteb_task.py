"""An MTEB task made of a data set that is already in memory: the bundled help desk, a file, a folder."""

from hashlib import sha256
from typing import Literal

from caravan.data.dataset import Dataset
from caravan.integrations.found import missing

try:
    import datasets
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskRetrieval
except ModuleNotFoundError as error:
    raise missing(error, extra="mteb") from None


def retrieval_task(dataset: Dataset, split: Literal["train", "validation", "test"] = "test") -> AbsTaskRetrieval:
    """Make a data set's documents and one split's queries a task for `mteb.evaluate`; no network is needed."""
    examples = getattr(dataset, split)
    documents = [{"id": each.doc_id, "title": each.title, "text": each.text} for each in dataset.catalogue]
    queries = [{"id": f"q{number}", "text": example.text} for number, example in enumerate(examples)]
    relevant = {f"q{number}": dict.fromkeys(example.doc_ids, 1) for number, example in enumerate(examples)}
    revision = sha256(repr((dataset.catalogue.fingerprint, queries, relevant)).encode("utf-8", "replace")).hexdigest()

    class LocalRetrieval(AbsTaskRetrieval):
        """A data set that is already in memory."""

        metadata = TaskMetadata(
            name=f"Caravan{dataset.name.title()}",
            description=f"Documents and {split} queries of {dataset.name}.",
            dataset={"path": dataset.name, "revision": revision[:16]},
            type="Retrieval",
            category="t2t",
            eval_splits=[split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

    task = LocalRetrieval()
    corpus, asked = datasets.Dataset.from_list(documents), datasets.Dataset.from_list(queries)
    task.dataset = {
        "default": {split: {"corpus": corpus, "queries": asked, "relevant_docs": relevant, "top_ranked": None}}
    }
    task.data_loaded = True
    return task
