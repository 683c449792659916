"""What the service allows, and what it says where it does not: settings of `caravan serve`, refusals with a status."""

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from caravan.app.answers.writing import Writing
from caravan.config import PositiveFloat, PositiveInt
from caravan.errors import CaravanError, ConfigError


class RefusedError(CaravanError):
    """A request that is not answered, with the HTTP status that says why.

    Attributes:
        status: an HTTP status.
        kind: one word for it, the `error_type` of the answer.
        retry_after: seconds after which to ask again, or None.
    """

    def __init__(self, message: str, status: HTTPStatus, kind: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.retry_after = retry_after


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Limits:
    """Sizes and times, each of which a request may not pass."""

    max_batch: PositiveInt = 64  # texts a forward pass; more gain nothing on a processor and delay everybody
    max_waiting: PositiveInt = 512  # texts that may wait, some seconds of work: later ones are told to come again
    timeout: PositiveFloat = 30.0  # seconds from a request's last byte to its answer
    body_timeout: PositiveFloat = 10.0  # seconds for a request's body to come in: slow ones hold a connection
    max_body_bytes: PositiveInt = 2 * 2**20  # about 64 texts of the longest kind, twice over
    max_texts: PositiveInt = 256  # queries or texts a request
    max_characters: PositiveInt = 20_000  # a text; the model reads its first 256 tokens anyway
    max_k: PositiveInt = 1000  # hits a query
    max_asking: PositiveInt = (
        8  # questions that are answered or wait: one takes seconds, later ones had better wait outside
    )
    answer_timeout: PositiveFloat = (
        120.0  # seconds to the end of an answer: a paragraph of a small model on a processor
    )
    max_documents: PositiveInt = 100  # documents a change, whose texts are encoded between the queries of others
    retry_after: Annotated[int, Field(ge=1)] = 1  # seconds: a full queue is worked off in about that time


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What `caravan serve` was told beyond limits.

    Attributes:
        folder: the saved retriever.
        limits: sizes and times.
        mips: whether plain vector search can be asked for beside the retriever.
        device: where to compute.
        keys: a file of keys, or None.
        local_changes: whether loopback may change documents where there is no write key.
        origins: web origins that may ask from a browser.
        log_texts: whether the log may hold queries.
        writing: who writes the answers of /ask.
        training: the training to show, by the folder that it writes or that of a federation; `folder` if None.
        watch: seconds between two looks for a changed folder; 0: only when asked.
    """

    folder: str
    limits: Limits
    mips: bool = False
    device: str = "cpu"
    keys: str | None = None
    local_changes: bool = False
    origins: tuple[str, ...] = ()
    log_texts: bool = False
    writing: Writing = field(default_factory=Writing)
    training: str | None = None
    watch: float = 0.0


def limits_from(values: dict[str, Any]) -> Limits:
    """Make limits of options; None means the default.

    Raises:
        ConfigError: a value is out of range, or the queue is shorter than what one request may ask for.
    """
    try:
        limits = TypeAdapter(Limits).validate_python({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
        raise ConfigError(f"{option}: {first['msg']}, got {first['input']!r}; give another value") from None
    if limits.max_waiting < limits.max_texts:
        raise ConfigError(
            f"--max-waiting {limits.max_waiting} is below --max-texts {limits.max_texts}: a request of that size would "
            f"never be taken; raise the first or lower the second"
        )
    return limits


def too_large(message: str) -> RefusedError:
    """A request that asks for more than is allowed (413)."""
    return RefusedError(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large")


def unusable(message: str) -> RefusedError:
    """A request that nobody could answer (422)."""
    return RefusedError(message, HTTPStatus.UNPROCESSABLE_ENTITY, "validation")


def unknown(message: str) -> RefusedError:
    """Something that is not here (404)."""
    return RefusedError(message, HTTPStatus.NOT_FOUND, "unknown")


def conflict(message: str) -> RefusedError:
    """Something that does not go with what is here (409)."""
    return RefusedError(message, HTTPStatus.CONFLICT, "conflict")


def unavailable(message: str, *, retry_after: int | None = None) -> RefusedError:
    """A request that could be answered later (503)."""
    return RefusedError(message, HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", retry_after=retry_after)
