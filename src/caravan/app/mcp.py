"""The command `caravan mcp`: the documents as tools of an assistant."""

from typing import Annotated

import typer

from caravan.app.answers.writing import ContextTokens, EndpointModel, EndpointUrl, GeneratorName, Writing
from caravan.app.command import Json, print_json


def mcp(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `caravan train` wrote.")],
    http: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            metavar="PORT",
            help="Serve http://127.0.0.1:PORT/mcp (streamable HTTP, this machine alone) instead of standard streams.",
        ),
    ] = None,
    generator: GeneratorName = "extractive",
    endpoint: EndpointUrl = None,
    endpoint_model: EndpointModel = None,
    context_tokens: ContextTokens = 4096,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Give an assistant (an MCP client) the tools `search` and `ask`, and the documents to read.

    The client starts the command itself and talks to it over standard input and output (docs/integrations.md).
    With --json the tools are listed and the command ends.

    caravan mcp my-retriever
    caravan mcp my-retriever --http 8001
    """
    writing = Writing.of_options(generator, endpoint, endpoint_model, context_tokens)
    import asyncio

    from caravan.errors import IntegrationError

    try:
        from caravan.app.toolbox import make_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        raise IntegrationError("caravan mcp needs mcp; install it: pip install 'caravan[mcp]'") from None
    from caravan.app.answers.answering import Answering
    from caravan.app.answers.evidence import calibrated
    from caravan.storage import load

    retriever = load(model, device=device)
    writer = writing.make(retriever.encoder.backbone)

    def prepare() -> Answering:
        calibration = None if as_json else calibrated(model, retriever)
        return Answering(retriever, writer, calibration=calibration)

    server = make_server(retriever, prepare)
    if as_json:
        tools = asyncio.run(server.list_tools())
        print_json({"tools": [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]})
        return
    try:
        if http is not None:
            server.run("streamable-http", port=http)
        else:
            server.run()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
