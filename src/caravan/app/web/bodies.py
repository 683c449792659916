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
    bm25: bool = Field(False, description="Also rank by words, with BM25.")
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


class RivalAnswer(BaseModel):
    """One document that another way of searching finds."""

    rank: int
    doc_id: str
    score: float = Field(description="Inner product of the frozen model's vectors, or BM25.")
    title: str


class ResultAnswer(BaseModel):
    """What was found for one query."""

    hits: list[HitAnswer]
    mips: list[RivalAnswer] | None = None
    bm25: list[RivalAnswer] | None = None


class SearchAnswer(BaseModel):
    """Results in the order of the queries."""

    results: list[ResultAnswer]


class AskBody(BaseModel):
    """A question."""

    model_config = _example({"query": "my bird went dark mid ride"})

    query: Text
    stream: bool = Field(
        False, description="Send the answer as it is written; `Accept: text/event-stream` asks for the same."
    )


class CitationAnswer(BaseModel):
    """A document by the number that an answer names it by."""

    number: int
    doc_id: str
    title: str
    probability: float = Field(description="That it answers; calibrated where `/info` says so.")


class AskAnswer(BaseModel):
    """An answer with the documents it is from, or "I don't know."; streamed, the last event, `answer`."""

    text: str
    known: bool = Field(description="Whether there is an answer.")
    confidence: float = Field(description="Probability that a document found answers.")
    citations: list[CitationAnswer] = Field(description="Documents that the text names.")
    found: list[CitationAnswer] = Field(
        description="Documents that the generator was given, or that were too doubtful."
    )
    generator: str


class PieceEvent(BaseModel):
    """A part of an answer as it is written: the data of the event `piece`."""

    text: str
    afresh: bool = Field(description="What was sent before is void: the answer begins again.")


class PointAnswer(BaseModel):
    """An epoch, or a round of a federation; what was not measured or sent is null."""

    stage: str
    step: int = Field(description="Number of the epoch or round in its stage, from 1.")
    of: int = Field(description="How many there are at most.")
    loss: float | None = None
    recall_at_1: float | None = Field(None, description="Of the validation queries.")
    seconds: float = Field(description="From the training's start.")
    bytes_up: int | None = Field(None, description="From clients to the server, in this round.")
    bytes_down: int | None = Field(None, description="From the server to clients, in this round.")
    epsilon: float | None = Field(None, description="Spent by then, where the training is private.")


class NowAnswer(BaseModel):
    """How far a training is within an epoch or round."""

    task: str
    done: int
    total: int
    loss: float | None = Field(description="Of the latest batch.")


class TrainingAnswer(BaseModel):
    """A training that runs or ran; the data of the event `training`."""

    state: Literal["none", "running", "finished", "stopped"]
    folder: str = Field(description="Name of the folder that it writes.")
    settings: dict[str, Any] = Field(description="Some of its settings.")
    points: list[PointAnswer]
    privacy: str = Field(description="What is promised of the training queries, in words.")
    measures: dict[str, Any] = Field(
        description="Of a finished training: `split`, and `results` by method, each with `metrics` and `seconds`."
    )
    now: NowAnswer | None = Field(None, description="Of a running training, where it says so.")


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


class MarkBody(BaseModel):
    """A document marked right or wrong for a query."""

    model_config = _example({"query": "how do I make it ring", "doc_id": "bell", "right": True})

    query: Text
    doc_id: Text
    right: bool = Field(description="Whether the document answers the query.")


class MarksCountAnswer(BaseModel):
    """How many marks there are."""

    marks: int


class MarkAnswer(BaseModel):
    """One mark."""

    query: str
    doc_id: str
    right: bool
    time: str = Field(description="When it was made, ISO 8601, UTC.")
    model: str = Field(description="Which weights were served then: the start of their SHA-256.")


class MarksAnswer(BaseModel):
    """The newest marks, newest first."""

    marks: list[MarkAnswer]
    total: int


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
    mips: bool = Field(description="Whether plain vector search can be asked for.")
    generator: str = Field(description="Who writes the answers of /ask.")
    calibrated: bool = Field(description="Whether probabilities of answers were set on validation queries.")
    can_change: bool = Field(description="Whether this caller may change documents.")
    training: bool = Field(description="Whether there is a training to follow.")
    marks: int = Field(description="How many results were marked right or wrong.")
    changes: dict[str, int] = Field(description="Documents added, replaced and removed since training.")


class HealthAnswer(BaseModel):
    """Whether the service lives and takes work."""

    status: Literal["live", "ready"]


class ErrorAnswer(BaseModel):
    """Why a request was not answered."""

    error: str
    error_type: str
