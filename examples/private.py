"""Train with differential privacy for each question: `python examples/private.py [FOLDER]`.

The help desk has 25 questions a document: too few to be both hidden and learned from, so expect no more than plain
vector search (about 0.5). Where a document has thousands, privacy costs about a point: docs/privacy.md has figures.

What a training spends stays spent: it goes into a ledger on this machine (`caravan privacy ledger`), and each further
run of this script adds to it. `CARAVAN_LEDGER` names another place, for trying things out.
"""

import sys

from caravan import Dataset, config_from_dict, evaluate, save, train

folder = sys.argv[1] if len(sys.argv) > 1 else "private-retriever"
data = Dataset.read("helpdesk")

retriever = train(data, config_from_dict({"training": {"mode": "head"}, "privacy": {"mode": "dp-sgd", "epsilon": 8}}))
save(retriever, folder)

print(retriever.record["privacy"])
spent = retriever.record["guarantees"]["all"]
print(f"epsilon {spent['epsilon']:.2f} in this training, {spent['all_runs']['epsilon']:.2f} in all runs on this data")
print("recall@1 on the test questions:", round(evaluate(retriever, data)["recall@1"].value, 3))
