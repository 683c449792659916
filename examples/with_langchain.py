"""A LangChain chain from a question to a prompt with documents: `python examples/with_langchain.py [FOLDER]`."""

import sys
from pathlib import Path

from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from caravan import Dataset, config_from_dict, save, train
from caravan.integrations.langchain import CaravanRetriever

folder = sys.argv[1] if len(sys.argv) > 1 else "helpdesk-retriever"
if not Path(folder).exists():
    save(train(Dataset.read("helpdesk"), config_from_dict({"training": {"mode": "head"}})), folder)

retriever = CaravanRetriever(source=folder, k=3)
for document in retriever.invoke("my bird went dark mid ride"):
    print(f"{document.metadata['probability']:.0%}  {document.metadata['doc_id']}: {document.metadata['title']}")


def written(documents):
    """Give the documents as one text."""
    return "\n\n".join(f"[{number}] {document.page_content}" for number, document in enumerate(documents, start=1))


prompt = ChatPromptTemplate.from_messages(
    [("system", "Answer from these documents alone:\n\n{documents}"), ("human", "{question}")]
)
# Put your chat model at the end: `chain | model`.
chain = {"documents": retriever | written, "question": RunnablePassthrough()} | prompt
messages = chain.invoke("how do i cancel an order?").to_messages()
print(f"\nThe prompt has {len(messages[0].content)} characters of documents and asks: {messages[1].content}")
