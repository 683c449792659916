"""A LlamaIndex query engine on a trained retriever: `python examples/with_llama_index.py [FOLDER]`."""

import sys
from pathlib import Path

from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine

from caravan import Dataset, config_from_dict, save, train
from caravan.integrations.llama_index import CaravanRetriever

folder = sys.argv[1] if len(sys.argv) > 1 else "helpdesk-retriever"
if not Path(folder).exists():
    save(train(Dataset.read("helpdesk"), config_from_dict({"training": {"mode": "head"}})), folder)

retriever = CaravanRetriever(folder, similarity_top_k=3)
for found in retriever.retrieve("my bird went dark mid ride"):
    print(f"{found.score:.0%}  {found.node.node_id}: {found.node.metadata['title']}")

# A node's score is a probability, so a cut-off means the same for every question.
engine = RetrieverQueryEngine.from_args(
    retriever,
    llm=MockLLM(),  # put your own here; this one repeats its prompt
    node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=0.01)],
)
answer = engine.query("how do i cancel an order?")
print("\nThe answer was written from", [source.node.node_id for source in answer.source_nodes])
