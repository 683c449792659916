"""Train a retriever, measure it, save it, load it again, search: `python examples/search.py [FOLDER]`."""

import sys

from caravan import Dataset, config_from_dict, evaluate, load, save, train

folder = sys.argv[1] if len(sys.argv) > 1 else "helpdesk-retriever"
data = Dataset.read("helpdesk")  # or a CSV, a folder, a BEIR set, a Hugging Face data set id

retriever = train(data, config_from_dict({"training": {"mode": "head"}}))  # seconds; mode "adapter" takes minutes
print("recall@1 on the test questions:", round(evaluate(retriever, data)["recall@1"].value, 3))
save(retriever, folder)

for hit in load(folder).search("my bird went dark mid ride", k=3):
    print(f"{hit.probability:.0%}  {hit.doc_id}: {hit.title}")
