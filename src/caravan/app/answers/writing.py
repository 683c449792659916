"""Which generator the options of `caravan ask` and `caravan serve` name."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from caravan.app.answers.generators import Generator
    from caravan.model.backbone import Backbone

GeneratorName = Annotated[
    str,
    typer.Option("--generator", help="extractive, self (the model that encodes), a Hugging Face id, or a folder."),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint", metavar="URL", help="An OpenAI-compatible endpoint, such as http://localhost:8000/v1."),
]
EndpointModel = Annotated[
    str | None, typer.Option("--endpoint-model", metavar="NAME", help="The model to ask for there.")
]
ContextTokens = Annotated[
    int, typer.Option("--context-tokens", min=64, help="Most tokens of prompt and answer together.")
]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Who writes answers.

    Attributes:
        generator: "extractive", "self", a Hugging Face id, or a folder; not looked at where there is an endpoint.
        endpoint: address of an OpenAI-compatible endpoint, or None.
        endpoint_model: the model to ask for there.
        context_tokens: most tokens of prompt and answer together.
    """

    generator: str = "extractive"
    endpoint: str | None = None
    endpoint_model: str | None = None
    context_tokens: int = 4096

    @classmethod
    def of_options(cls, generator: str, endpoint: str | None, endpoint_model: str | None, tokens: int) -> "Writing":
        """Take what was given on a command line.

        Raises:
            typer.BadParameter: two options contradict each other, or one needs another.
        """
        if (endpoint is None) != (endpoint_model is None):
            raise typer.BadParameter("--endpoint and --endpoint-model go together", param_hint="--endpoint")
        if endpoint is not None and generator != "extractive":
            raise typer.BadParameter("contradicts --endpoint; leave one of them out", param_hint="--generator")
        return cls(generator=generator, endpoint=endpoint, endpoint_model=endpoint_model, context_tokens=tokens)

    def make(self, backbone: "Backbone") -> "Generator":
        """Load the generator; the blocks of `backbone` are shared where it is the same model.

        Raises:
            AnswerError: the endpoint's address or key cannot be used, or openai is not installed.
            BackboneError: there is no such model, or it is no decoder.
        """
        from caravan.app.answers.generators import Extractive, HuggingFace

        if self.endpoint is not None:
            from caravan.app.answers.endpoint import Endpoint

            return Endpoint(self.endpoint, self.endpoint_model or "", context_tokens=self.context_tokens)
        if self.generator == "extractive":
            return Extractive()
        return HuggingFace.named(self.generator, backbone, context_tokens=self.context_tokens)
