"""A Haystack pipeline with a trained retriever, to YAML and back: `python examples/with_haystack.py [FOLDER]`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")  # Haystack reports how it is used unless told not to

from haystack import Pipeline
from haystack.components.builders import PromptBuilder

from caravan import Dataset, config_from_dict, save, train
from caravan.integrations.haystack import CaravanRetriever

folder = sys.argv[1] if len(sys.argv) > 1 else "helpdesk-retriever"
if not Path(folder).exists():
    save(train(Dataset.read("helpdesk"), config_from_dict({"training": {"mode": "head"}})), folder)

template = """Answer from these documents alone:
{% for document in documents %}[{{ loop.index }}] {{ document.content }}
{% endfor %}Question: {{ question }}"""

pipeline = Pipeline()
pipeline.add_component("retriever", CaravanRetriever(folder, top_k=3))
pipeline.add_component("prompt", PromptBuilder(template=template, required_variables="*"))
pipeline.connect("retriever.documents", "prompt.documents")  # then your generator

# Haystack loads classes of its own alone, unless a module is named as trusted.
pipeline = Pipeline.loads(pipeline.dumps(), allowed_modules=["caravan.integrations.haystack"])

question = "my bird went dark mid ride"
result = pipeline.run(
    {"retriever": {"query": question}, "prompt": {"question": question}}, include_outputs_from={"retriever"}
)
for document in result["retriever"]["documents"]:
    print(f"{document.score:.0%}  {document.id}: {document.meta['title']}")
print(f"\nThe prompt has {len(result['prompt']['prompt'])} characters.")
