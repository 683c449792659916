"""Evaluate a trained retriever and the frozen model with MTEB, offline: `python examples/with_mteb.py [FOLDER]`."""

import sys
from pathlib import Path

import mteb

from caravan import Dataset, config_from_dict, save, train
from caravan.integrations.mteb import FrozenSearch, TrainedSearch
from caravan.integrations.mteb_task import retrieval_task

folder = sys.argv[1] if len(sys.argv) > 1 else "helpdesk-retriever"
data = Dataset.read("helpdesk")
if not Path(folder).exists():
    save(train(data, config_from_dict({"training": {"mode": "head"}})), folder)

for model in (FrozenSearch(), TrainedSearch(folder)):
    # The documents and test questions are a task in memory. Without `cache=None` results are kept in ~/.cache/mteb.
    (result,) = mteb.evaluate(model, retrieval_task(data), cache=None, show_progress_bar=False).task_results
    (scores,) = result.scores["test"]
    print(f"{model.name}: nDCG@10 {scores['ndcg_at_10']:.3f}, recall@1 {scores['recall_at_1']:.3f}")
