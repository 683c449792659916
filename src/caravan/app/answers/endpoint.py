"""An OpenAI-compatible endpoint as the generator (the only importer of openai): streamed, one retry, no key shown."""

import os
from collections.abc import Generator, Iterator, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from caravan.app.answers.evidence import Source
from caravan.app.answers.generators import ANSWER_TOKENS, CONTEXT_TOKENS, Piece
from caravan.app.answers.prompt import Message, compose
from caravan.errors import AnswerError, GeneratorError

KEY = "OPENAI_API_KEY"
_SECONDS = 60.0  # without a single byte
_BYTES_A_TOKEN = 3  # of UTF-8; English has about four, so the estimate is on the safe side


class Endpoint:
    """A model behind HTTP, spoken to through the official client.

    Attributes:
        name: model and address.
    """

    def __init__(
        self, url: str, model: str, *, context_tokens: int = CONTEXT_TOKENS, answer_tokens: int = ANSWER_TOKENS
    ) -> None:
        """Prepare the client; nothing is sent yet. The key, if any, is read from the environment (`OPENAI_API_KEY`).

        Raises:
            AnswerError: openai is not installed, the address is none, or the key would travel unencrypted.
        """
        try:
            import openai
        except ImportError:
            raise AnswerError("an endpoint needs the package openai; install caravan[ask]") from None
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname or place.username or place.password:
            raise AnswerError("the endpoint is no address like https://host/v1 (and without a name or password in it)")
        key = os.environ.get(KEY, "").strip()
        if key and place.scheme == "http" and not _loopback(place.hostname):
            raise AnswerError(f"{KEY} would go unencrypted to {place.hostname}; give an https:// address, or unset it")
        self.name = f"{model} at {place.hostname}"
        self._openai, self._model, self._key = openai, model, key
        self._answer_tokens, self._room = answer_tokens, context_tokens - answer_tokens
        # The client insists on a key; local servers ask for none. Retries are ours: a stream can drop in its middle.
        self._client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=_SECONDS)

    def write(self, question: str, sources: Sequence[Source]) -> Iterator[Piece]:
        """Write as the endpoint sends; a connection that drops is tried once more, from the start.

        Raises:
            GeneratorError: the endpoint refuses, or the connection drops twice.
            AnswerError: the prompt has no room.
        """
        documents = [source.document for source in sources]
        messages = compose(question, documents, room=self._room, count=_estimated).messages
        for attempt in (1, 2):
            if attempt == 2:
                yield Piece("", afresh=True)
            try:
                if (yield from self._once(messages)):
                    return
                fault = "the stream ended in the middle"
            except self._openai.APIConnectionError as error:
                fault = self._told(error)
            except self._openai.OpenAIError as error:
                raise GeneratorError(
                    f"{self.name} refused: {self._told(error)}; check model, address and {KEY}"
                ) from None
        raise GeneratorError(f"{self.name}: no answer in two attempts ({fault}); check that the endpoint runs")

    def _once(self, messages: list[Message]) -> Generator[Piece, None, bool]:
        """Give the pieces of one attempt; return whether it came to an end of its own."""
        sent: Any = messages
        finished = False
        stream = self._client.chat.completions.create(
            model=self._model, messages=sent, stream=True, temperature=0, max_tokens=self._answer_tokens
        )
        with stream:
            for chunk in stream:
                for choice in chunk.choices[:1]:
                    finished = finished or choice.finish_reason is not None
                    if choice.delta.content:
                        yield Piece(choice.delta.content)
        return finished

    def _told(self, error: Exception) -> str:
        text = " ".join(str(error).split())
        return (text.replace(self._key, "***") if self._key else text)[:200] or type(error).__name__


def _estimated(messages: list[Message]) -> int:
    return sum(-(-len(message["content"].encode()) // _BYTES_A_TOKEN) + 8 for message in messages)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
