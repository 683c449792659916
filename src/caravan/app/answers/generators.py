"""Who writes the answer: the best sentences of the documents, or a causal language model of Hugging Face."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, Protocol

import torch

from caravan.app.answers.evidence import Source
from caravan.app.answers.prompt import Message, compose, plain
from caravan.config import BackboneConfig
from caravan.errors import BackboneError, GeneratorError
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.language import language_model
from caravan.model.source import model_folder

ANSWER_TOKENS = 256  # a paragraph and its citations
CONTEXT_TOKENS = 4096  # five long documents; more makes small models slow and no better


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it is written.

    Attributes:
        text: what is new.
        afresh: what was given before is void: the answer begins again.
    """

    text: str
    afresh: bool = False


class Generator(Protocol):
    """Writes an answer from documents, citing them by their numbers: [1] is the first of `sources`."""

    name: str

    def write(self, question: str, sources: Sequence[Source]) -> Iterator[Piece]:
        """Write piece by piece."""
        ...


class Extractive:
    """The sentences most like the question: two of the first document, one of each other. Needs no generator."""

    name = "extractive"

    def write(self, question: str, sources: Sequence[Source]) -> Iterator[Piece]:
        """Give one piece a document, in the order of the documents and of the sentences in them."""
        del question
        for number, source in enumerate(sources, start=1):
            order = sorted(range(len(source.sentences)), key=lambda place: -source.cosines[place])
            chosen = sorted(order[: 2 if number == 1 else 1])
            said = " ".join(source.sentences[place] for place in chosen)
            yield Piece(("" if number == 1 else "\n") + f"{said} [{number}]")


class HuggingFace:
    """A causal language model, decoded greedily: the same question, the same answer.

    Attributes:
        name: as it was given.
        model: transformers' model; its blocks are the backbone's own.
    """

    def __init__(
        self, backbone: Backbone, *, context_tokens: int = CONTEXT_TOKENS, answer_tokens: int = ANSWER_TOKENS
    ) -> None:
        self.name = backbone.config.name
        self.model: Any = language_model(backbone)
        self._tokenizer: Any = deepcopy(backbone.tokenizer)  # how it cuts texts is the encoder's affair
        limit = getattr(backbone.model.config, "max_position_embeddings", None) or context_tokens
        self._answer_tokens = min(answer_tokens, limit // 4)
        self._room = min(context_tokens, int(limit)) - self._answer_tokens

    @classmethod
    def named(cls, name: str, shared: Backbone, **limits: int) -> "HuggingFace":
        """Load a model by id or folder, or take the blocks of `shared` where that is the same one.

        Args:
            name: a Hugging Face id, a folder, or "self" for the model that encodes.
            shared: the retriever's backbone.
            limits: see the class.

        Raises:
            BackboneError: there is no such model, or it is no decoder.
        """
        config = shared.config
        if name != "self":
            config = BackboneConfig(name=name, device=config.device)
            if model_folder(config).resolve() != model_folder(shared.config).resolve():
                return cls(load_backbone(config), **limits)
        try:
            return cls(shared, **limits)
        except BackboneError as error:
            if name != "self":
                raise
            raise BackboneError(f"the retriever's own model cannot write: {error}") from None

    def write(self, question: str, sources: Sequence[Source]) -> Iterator[Piece]:
        """Write, token by token; a reader that stops early stops the model.

        Raises:
            GeneratorError: memory ends.
            AnswerError: the prompt has no room.
        """
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        reserved = [token for token in self._tokenizer.all_special_tokens if token.strip()]
        documents = [source.document for source in sources]
        prompt = compose(question, documents, room=self._room, count=lambda m: len(self._ids(m)), reserved=reserved)
        ids = torch.tensor([self._ids(prompt.messages)], device=self.model.device)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, faults = Event(), []

        def generate() -> None:
            try:
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._settings(),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([lambda *_, **__: torch.tensor([stop.is_set()])]),
                )
            except Exception as error:  # told by the reader, in its own thread
                faults.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            for text in streamer:
                if text:
                    yield Piece(text)
        finally:
            stop.set()
            thread.join()
        if faults:
            reason = " ".join(str(faults[0]).split())[:160] or type(faults[0]).__name__
            raise GeneratorError(
                f"{self.name} could not write an answer: {reason}; take another generator"
            ) from faults[0]

    def _settings(self) -> Any:
        own = self.model.generation_config
        from transformers import GenerationConfig

        end = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        padding = own.pad_token_id if own.pad_token_id is not None else end
        padding = padding[0] if isinstance(padding, list) else padding
        return GenerationConfig(
            max_new_tokens=self._answer_tokens, do_sample=False, eos_token_id=end, pad_token_id=padding
        )

    def _ids(self, messages: list[Message]) -> list[int]:
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            return tokenizer(plain(messages), verbose=False)["input_ids"]  # too long is what is being found out
        from jinja2 import TemplateError

        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        try:
            text = tokenizer.apply_chat_template(messages, **options)
        except TemplateError:  # some formats have no system turn
            joined = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}]
            text = tokenizer.apply_chat_template(joined, **options)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
