"""The command `caravan serve`."""

import json
from typing import Annotated

import typer

from caravan.app.answers.writing import ContextTokens, EndpointModel, EndpointUrl, GeneratorName, Writing


def serve(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `caravan train` wrote.")],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    keys: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="API keys, `read KEY` or `write KEY` a line; also CARAVAN_READ_KEYS and CARAVAN_WRITE_KEYS.",
        ),
    ] = None,
    local_changes: Annotated[
        bool,
        typer.Option("--local-changes", help="Without a write key, let this machine itself change documents."),
    ] = False,
    mips: Annotated[bool, typer.Option("--mips", help="Keep plain vector search ready beside the retriever.")] = False,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes; they share the frozen weights, not the head.")
    ] = 1,
    watch: Annotated[
        float | None,
        typer.Option(
            min=0, help="Seconds between looks for a changed folder; 0: on POST /reload alone. With several workers 1."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    generator: GeneratorName = "extractive",
    endpoint: EndpointUrl = None,
    endpoint_model: EndpointModel = None,
    context_tokens: ContextTokens = 4096,
    training: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The training to show: its --out, or a federation's folder; DIR itself if left out."
        ),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Texts a forward pass at most.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Texts that may wait; more are answered with 429.")] = None,
    max_texts: Annotated[int | None, typer.Option(help="Texts a request at most.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Bytes a request at most.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to an answer; later it is a 503.")] = None,
    max_asking: Annotated[int | None, typer.Option(help="Questions that are answered or wait at most.")] = None,
    answer_timeout: Annotated[float | None, typer.Option(help="Seconds to the end of a written answer.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page's origin that may ask from a browser. Repeatable."),
    ] = None,
    log_queries: Annotated[bool, typer.Option("--log-queries", help="Write queries into the log.")] = False,
    print_openapi: Annotated[
        bool, typer.Option("--json", help="Print the OpenAPI description as one JSON object and end.")
    ] = False,
) -> None:
    """Answer searches and questions over HTTP, and show a training (docs/service.md).

    caravan serve my-retriever
    caravan serve my-retriever --host 0.0.0.0 --keys keys.txt --workers 2
    caravan serve my-retriever --generator Qwen/Qwen3-0.6B
    caravan serve my-retriever --training next-retriever
    """
    from caravan.app.web.limits import Terms, limits_from
    from caravan.errors import ConfigError

    limits = limits_from(
        {
            "max_batch": max_batch,
            "max_waiting": max_waiting,
            "max_texts": max_texts,
            "max_body_bytes": max_body_bytes,
            "timeout": timeout,
            "max_asking": max_asking,
            "answer_timeout": answer_timeout,
        }
    )
    terms = Terms(
        folder=model,
        limits=limits,
        mips=mips,
        device=device,
        keys=keys,
        local_changes=local_changes,
        origins=tuple(cors_origin or ()),
        log_texts=log_queries,
        writing=Writing.of_options(generator, endpoint, endpoint_model, context_tokens),
        training=training,
        watch=watch if watch is not None else float(workers > 1),
    )
    if workers > 1 and not terms.watch:
        raise ConfigError("--watch 0 with several workers: they would not see each other's changes; give seconds")
    try:
        from caravan.app.web import hosting
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise ConfigError(f"caravan serve needs {error.name}; install it: pip install 'caravan[serve]'") from None
    if print_openapi:
        typer.echo(json.dumps(hosting.application(terms).openapi(), indent=2))
        return
    try:
        hosting.host(terms, host, port, workers=workers)
    except KeyboardInterrupt:  # told on, once every request was answered
        raise typer.Exit(130) from None
