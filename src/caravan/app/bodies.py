"""What requests and answers of the service look like, with an example of each."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Metadata = dict[str, str]


def _example(value: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [value]})


class SearchBody(BaseModel):
    """One query or several."""

    model_config = _example({"query": "my bird went dark mid ride", "k": 3})

    query: Text | Annotated[list[Text], Field(min_length=1)] = Field(description="A query, or a list of them.")
    k: int = Field(10, ge=1, description="Hits a query; above the number of documents it means all.")
    filter: dict[str, str | list[str]] = Field(
        default_factory=dict, description="Metadata that hits must have; of a list of values one."
    )
    mips: bool = Field(False, description="Also rank by plain vector search (needs --mips).")
    texts: bool = Field(True, description="Give the documents' texts and metadata too.")


class HitAnswer(BaseModel):
    """One document that was found."""

    rank: int
    doc_id: str
    score: float = Field(description="The head's logit, comparable within one query only.")
    probability: float = Field(description="Softmax over all documents, also where a filter is set.")
    title: str
    text: str | None = None
    metadata: Metadata | None = None


class MipsAnswer(BaseModel):
    """One document that plain vector search finds."""

    rank: int
    doc_id: str
    score: float = Field(description="Inner product of the frozen model's vectors.")
    title: str


class ResultAnswer(BaseModel):
    """What was found for one query."""

    hits: list[HitAnswer]
    mips: list[MipsAnswer] | None = None


class SearchAnswer(BaseModel):
    """Results in the order of the queries."""

    results: list[ResultAnswer]


class DocumentBody(BaseModel):
    """A document."""

    model_config = _example({"doc_id": "bell", "title": "The bell", "text": "Turn the ring to the left."})

    doc_id: Text
    text: Text
    title: str = ""
    metadata: dict[str, Any] = Field(default_factory=dict, description="Strings; anything else is kept as JSON.")


class DocumentsBody(BaseModel):
    """Documents to add."""

    model_config = _example(
        {"documents": [{"doc_id": "bell", "title": "The bell", "text": "Turn the ring to the left."}]}
    )

    documents: list[DocumentBody] = Field(min_length=1)
    replace: bool = Field(False, description="Give documents that are known the new text; they keep their trained row.")


class DocumentsAnswer(BaseModel):
    """A page of the catalogue."""

    documents: list[DocumentBody]
    total: int
    offset: int


class ChangeAnswer(BaseModel):
    """What became of the documents that a request named."""

    added: list[str]
    replaced: list[str]
    unchanged: list[str]
    removed: list[str]
    documents: int = Field(description="How many there are now.")


class EmbedBody(BaseModel):
    """Texts to encode, as for Hugging Face's text-embeddings-inference."""

    model_config = _example({"inputs": ["my bird went dark mid ride"]})

    inputs: Text | Annotated[list[Text], Field(min_length=1)]
    normalize: bool = True
    truncate: bool = Field(True, description="false: a text that the model would cut is refused.")
    truncation_direction: Literal["Right", "right"] = "Right"


class RerankBody(BaseModel):
    """Texts to rank for a query, as for Hugging Face's text-embeddings-inference."""

    model_config = _example({"query": "dark mid ride", "texts": ["The battery is empty.", "Turn the ring."]})

    query: Text
    texts: list[Text] = Field(min_length=1)
    raw_scores: bool = Field(False, description="Logits instead of probabilities over the given texts.")
    return_text: bool = False
    truncate: bool = Field(True, description="false: a text that the model would cut is refused.")
    truncation_direction: Literal["Right", "right"] = "Right"


class RankAnswer(BaseModel):
    """One text with its place in the request."""

    index: int
    score: float
    text: str | None = None


class InfoAnswer(BaseModel):
    """What is served, in the words of text-embeddings-inference and some of our own."""

    model_id: str
    model_sha: str = Field(description="SHA-256 of the frozen model.")
    model_dtype: str
    model_type: dict[str, dict[str, str]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int
    max_client_batch_size: int
    version: str
    documents: int
    documents_sha: str = Field(description="SHA-256 of ids, titles and texts in order.")
    width: int
    adapter: str
    mips: bool
    changes: dict[str, int] = Field(description="Documents added, replaced and removed since training.")


class HealthAnswer(BaseModel):
    """Whether the service lives and takes work."""

    status: Literal["live", "ready"]


class ErrorAnswer(BaseModel):
    """Why a request was not answered."""

    error: str
    error_type: str
