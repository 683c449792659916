"""Four sites train one retriever and none shows its questions to another: `python examples/federated.py [FOLDER]`."""

import sys

from caravan import Dataset, config_from_dict, evaluate, federate, save

folder = sys.argv[1] if len(sys.argv) > 1 else "four-sites"
data = Dataset.read("helpdesk")

# One client a value of the column `site`. Here all are simulated on this machine; `caravan federate` runs real ones.
settings = {
    "training": {"mode": "head"},
    "federation": {"partition": "column", "column": "site", "rounds": 3},
}
retriever = federate(data, config_from_dict(settings))
save(retriever, folder)

for client in retriever.record["federation"]["clients"]:
    print(f"{client['name']}: {client['examples']} questions of its own")
print("recall@1 on the test questions:", round(evaluate(retriever, data)["recall@1"].value, 3))
