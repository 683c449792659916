"""The command `caravan ask`: an answer with the documents it is from."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from caravan.app.answers.writing import ContextTokens, EndpointModel, EndpointUrl, GeneratorName, Writing
from caravan.app.command import Json, print_json

if TYPE_CHECKING:
    from caravan.app.answers.answering import Answer


def ask(
    model: Annotated[str, typer.Argument(help="A folder that `caravan train` wrote.")],
    question: Annotated[str, typer.Argument(help="What is asked.")],
    generator: GeneratorName = "extractive",
    endpoint: EndpointUrl = None,
    endpoint_model: EndpointModel = None,
    context_tokens: ContextTokens = 4096,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Least confidence to answer at; as calibrated if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Answer a question from the documents, with citations, or say "I don't know".

    caravan ask my-retriever "tubeless?"
    caravan ask my-retriever "tubeless?" --generator Qwen/Qwen3-0.6B
    caravan ask my-retriever "tubeless?" --endpoint http://localhost:8000/v1 --endpoint-model qwen
    """
    writing = Writing.of_options(generator, endpoint, endpoint_model, context_tokens)
    from dataclasses import replace

    from caravan.app.answers.answering import Answer, Answering
    from caravan.app.answers.evidence import calibrated
    from caravan.storage import load

    retriever = load(model, device=device)
    writer = writing.make(retriever.encoder.backbone)
    calibration = calibrated(model, retriever)
    if threshold is not None:
        calibration = replace(calibration, threshold=threshold)
    answer = None
    for part in Answering(retriever, writer, calibration=calibration).stream(question):
        if isinstance(part, Answer):
            answer = part
        elif not as_json and sys.stdout.isatty():
            _show(part.text, afresh=part.afresh)
    assert answer is not None
    if as_json:
        print_json(
            {"question": question, **asdict(answer), "generator": writer.name, "calibration": asdict(calibration)}
        )
        return
    _tell(answer, shown=sys.stdout.isatty())
    if not calibration.queries:
        typer.echo("The confidence is not calibrated: there are no validation queries that may be used.")


def _show(text: str, *, afresh: bool) -> None:
    """Print a piece as it comes, without what would steer the terminal."""
    if afresh:
        typer.echo("\n(The connection dropped; once more.)")
    typer.echo("".join(part for part in text if part.isprintable() or part == "\n"), nl=False)


def _tell(answer: "Answer", *, shown: bool) -> None:
    from caravan.app.display import one_line

    if not shown or not answer.known:
        for line in answer.text.splitlines():
            typer.echo(one_line(line))
    else:
        typer.echo("")
    listed = answer.citations if answer.citations else answer.found
    if not answer.known:
        typer.echo(f"\nConfidence {answer.confidence:.0%} is too low to answer. The closest documents:")
    elif answer.citations:
        typer.echo(f"\nConfidence {answer.confidence:.0%}. Cited:")
    else:
        typer.echo(f"\nConfidence {answer.confidence:.0%}. The answer cites nothing; it was written from:")
    for citation in listed:
        typer.echo(
            f"  [{citation.number}] {citation.probability:6.1%}  {one_line(f'{citation.doc_id}: {citation.title}')}"
        )
