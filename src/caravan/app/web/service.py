"""The routes of `caravan serve`: search, documents, embed, rerank, info, health, metrics (the only fastapi importer).

A route checks sizes, hands texts to the batcher or documents to the shelf, and writes down the answer. Whatever it
cannot do it raises as a `CaravanError`; `gate.as_reply` makes the status of it.
"""

import asyncio
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from torch.nn.functional import normalize

from caravan.app.web import asking, following, marking
from caravan.app.web.access import Keys
from caravan.app.web.asking import Asking
from caravan.app.web.bodies import (
    ChangeAnswer,
    DocumentsAnswer,
    DocumentsBody,
    EmbedBody,
    HealthAnswer,
    InfoAnswer,
    RankAnswer,
    RerankBody,
    SearchAnswer,
    SearchBody,
)
from caravan.app.web.following import Following
from caravan.app.web.gate import NOTES, Gate, as_reply
from caravan.app.web.limits import RefusedError, conflict, too_large, unavailable, unknown, unusable
from caravan.app.web.marking import Marking
from caravan.app.web.metrics import CONTENT_TYPE, Metrics, forget_process
from caravan.app.web.routing import ERRORS, WRITE_ERRORS, Here, Service, as_json, needs, refusals
from caravan.app.web.serving import Asked, Found, Served
from caravan.app.web.shelf import Change, Shelf, checked_documents
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document, Hit
from caravan.errors import CaravanError
from caravan.model.encoder import check_texts

_PAGE = Path(__file__).with_name("page")  # static files of a web page, where there is one
_PAGE_HEADERS = {
    # Nothing from elsewhere, no script or style but our files, and no text that becomes HTML.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again each time, so that files of two versions never meet
}


open_routes = APIRouter(tags=["health"])
reading = APIRouter(dependencies=[needs("read")], responses=ERRORS, tags=["search"])
writing = APIRouter(dependencies=[needs("write")], responses=WRITE_ERRORS, tags=["documents"])


@reading.post("/search", response_model=SearchAnswer)
async def search(body: SearchBody, request: Request, service: Here) -> Response:
    """Find the documents most likely to answer each query."""
    limits = service.shelf.terms.limits
    if body.k > limits.max_k:
        raise unusable(f"k = {body.k}: at most {limits.max_k:,} hits a query are given; ask for fewer")
    queries = [body.query] if isinstance(body.query, str) else body.query
    found = await _ask(service, request, Asked(queries, "hits", k=body.k, filter=body.filter, mips=body.mips))
    catalogue = found.served.retriever.catalogue
    worded = await _by_words(found.served, queries, body, limits.timeout) if body.bm25 else ()
    results: list[dict[str, Any]] = []
    for number, hits in enumerate(found.hits):
        rows = [{name: getattr(hit, name) for name in Hit.__slots__} for hit in hits]  # asdict would copy the texts
        for row in rows:
            if body.texts:
                row["metadata"] = dict(catalogue.document(catalogue.row(row["doc_id"])).metadata)
            else:
                del row["text"]
        results.append({"hits": rows})
        if body.mips:
            results[-1]["mips"] = _listed(catalogue, found.mips[number])
        if body.bm25:
            results[-1]["bm25"] = _listed(catalogue, worded[number])
    return as_json({"results": results})


async def _by_words(
    served: Served, queries: Sequence[str], body: SearchBody, timeout: float
) -> list[list[tuple[int, float]]]:
    """Rank by words: beside the batches, since that takes no model."""
    work = asyncio.to_thread(served.by_words, queries, body.k, body.filter)
    try:
        return await asyncio.wait_for(work, timeout)
    except TimeoutError:  # the first time after a change of a large catalogue
        raise unavailable(f"no ranking by words within {timeout:g} s; ask again later", retry_after=1) from None


def _listed(catalogue: Catalogue, found: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    documents = [(catalogue.document(row), score) for row, score in found]
    return [
        {"rank": rank, "doc_id": document.doc_id, "score": score, "title": document.title}
        for rank, (document, score) in enumerate(documents, start=1)
    ]


@reading.get(
    "/documents", response_model=DocumentsAnswer, tags=["documents"], responses=refusals(s404="No such document")
)
async def documents(
    service: Here,
    doc_id: Annotated[list[str] | None, Query(description="Give these documents only.")] = None,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """Give documents by their ids, or the catalogue page by page."""
    catalogue = service.shelf.current.retriever.catalogue
    if doc_id is None:
        chosen: Sequence[Document] = catalogue.documents[offset : offset + limit]
    else:
        known = dict(zip(catalogue.ids, catalogue.documents, strict=True))
        for name in doc_id:
            if name not in known:
                raise unknown(f"no document {name[:60]!r}; check the id")
        chosen = [known[name] for name in doc_id]
    rows = [{**asdict(document), "metadata": dict(document.metadata)} for document in chosen]
    return as_json({"documents": rows, "total": len(catalogue), "offset": offset if doc_id is None else 0})


@writing.post("/documents", response_model=ChangeAnswer, responses=refusals(s409="It does not go with what is here"))
async def add_documents(body: DocumentsBody, service: Here) -> Response:
    """Add documents, or give known ones another text; they are saved before this is answered, and found at once."""
    limits = service.shelf.terms.limits
    if len(body.documents) > limits.max_documents:
        what = f"{len(body.documents):,} documents, at most {limits.max_documents:,} are taken"
        raise too_large(f"{what}; send several requests")
    given = checked_documents([document.model_dump() for document in body.documents])
    longest = max(len(document.content) for document in given)
    if longest > limits.max_characters:
        raise too_large(f"a document of {longest:,} characters, at most {limits.max_characters:,} are taken; split it")
    check_texts([document.content for document in given])
    return _change(await service.shelf.add(given, replacing=body.replace))


@writing.delete(
    "/documents",
    response_model=ChangeAnswer,
    responses=refusals(s404="No such document", s409="None would be left"),
)
async def remove_documents(
    service: Here, doc_id: Annotated[list[str], Query(min_length=1, description="Of the documents to remove.")]
) -> Response:
    """Remove documents; this is saved before it is answered."""
    return _change(await service.shelf.remove(doc_id))


@writing.post(
    "/reload", response_model=InfoAnswer, tags=["model"], responses=refusals(s409="It does not go with what is here")
)
async def reload(request: Request, service: Here) -> Response:
    """Read the model folder anew; a damaged one is refused and what was served stays."""
    try:
        await service.shelf.reload()
    except CaravanError as error:
        raise conflict(f"{error} -- what was served before is still served") from None
    return as_json(_info(service, request))


@reading.post("/embed", response_model=list[list[float]], tags=["text-embeddings-inference"])
async def embed(body: EmbedBody, request: Request, service: Here) -> Response:
    """Encode texts (frozen model and adapter)."""
    inputs = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    if not body.normalize and service.shelf.current.retriever.encoder.normalize:
        raise unusable("this retriever's vectors always have norm 1; leave normalize out")
    found = await _ask(service, request, Asked(inputs, "vectors", whole=not body.truncate))
    assert found.vectors is not None
    vectors = normalize(found.vectors, dim=1) if body.normalize else found.vectors
    return as_json(vectors.tolist())


@reading.post("/rerank", response_model=list[RankAnswer], tags=["text-embeddings-inference"])
async def rerank(body: RerankBody, request: Request, service: Here) -> Response:
    """Rank any texts for a query: by its trained row where a text is a document here, else as a new document."""
    asked = Asked([body.query, *body.texts], "ranks", whole=not body.truncate, raw=body.raw_scores)
    scores = (await _ask(service, request, asked)).scores
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    texts = [{"text": body.texts[index]} if body.return_text else {} for index in order]
    return as_json([{"index": index, "score": scores[index], **text} for index, text in zip(order, texts, strict=True)])


@reading.get("/info", response_model=InfoAnswer, tags=["model"])
async def info(request: Request, service: Here) -> Response:
    """Say what is served."""
    return as_json(_info(service, request))


@open_routes.get("/health", response_model=HealthAnswer, responses={503: ERRORS[503]})
@open_routes.get("/health/ready", response_model=HealthAnswer, responses={503: ERRORS[503]})
async def ready(service: Here) -> Response:
    """Say whether work is taken and gets done; 503 where not."""
    if not service.shelf.batcher.ready:
        raise unavailable("not ready: closing, or stuck in one batch")
    return as_json({"status": "ready"})


@open_routes.get("/health/live", response_model=HealthAnswer)
async def live() -> Response:
    """Say that the process lives."""
    return as_json({"status": "live"})


@reading.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["health"])
async def metrics(service: Here) -> Response:
    """Give all counters in Prometheus' text format."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)


async def _ask(service: Service, request: Request, asked: Asked) -> Found:
    """Check texts, have them answered in a batch, and note how it went."""
    limits, terms = service.shelf.terms.limits, service.shelf.terms
    if len(asked.texts) > limits.max_texts:
        raise too_large(f"{len(asked.texts):,} texts, at most {limits.max_texts:,} are taken; send several requests")
    for text in asked.texts:
        service.check_length(text)
    check_texts(asked.texts)
    found, timing = await service.shelf.batcher.submit(asked)
    notes = {"texts": len(asked.texts), "queue_ms": round(timing.queue_seconds * 1000, 2)}
    notes |= {"inference_ms": round(timing.inference_seconds * 1000, 2), "batch": timing.batch_size}
    if terms.log_texts:
        notes["asked"] = list(asked.texts)
    request.scope[NOTES] |= notes
    return found


def make_app(shelf: Shelf, keys: Keys, metrics: Metrics) -> FastAPI:
    """Put the application together.

    Args:
        shelf: what is served.
        keys: who may ask and who may change.
        metrics: what is counted; the shelf's own.
    """
    app = FastAPI(
        title="caravan",
        version=version("caravan"),
        summary="A classifier-as-retriever behind HTTP.",
        lifespan=_lifespan,
        # Their pages would load scripts from another host.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = Service(shelf, keys, metrics)
    app.state.asking = Asking(shelf)
    app.state.following = Following(shelf.terms.training or shelf.terms.folder)
    app.state.marking = Marking(shelf)
    of_rooms = (asking.router, following.router, marking.reading, marking.writing)  # a further room's routes join here
    for router in (reading, writing, *of_rooms, open_routes):
        app.include_router(router)
    app.add_exception_handler(CaravanError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse_route)
    if shelf.terms.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(shelf.terms.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    app.add_middleware(Gate, limits=shelf.terms.limits, metrics=metrics)  # pyright: ignore[reportArgumentType]
    if _PAGE.is_dir():
        app.mount("/", GZipMiddleware(_Page(directory=_PAGE, html=True)), name="page")
    return app


class _Page(StaticFiles):
    """The web page's files, each with what a browser must not do with it."""

    async def get_response(self, path: str, scope: MutableMapping[str, Any]) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_PAGE_HEADERS)
        return response


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    shelf: Shelf = app.state.service.shelf
    shelf.batcher.start()
    app.state.asking.start()
    watch = asyncio.create_task(shelf.watch()) if shelf.terms.watch else None
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        await app.state.asking.close()
        await shelf.batcher.close()
        forget_process()


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, CaravanError)
    reply = as_reply(error)
    return Response(reply.body, reply.status, headers=reply.headers)


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Where and what is wrong, but not what was sent: it may be long, and is a query.
    faults = [f"{'.'.join(map(str, fault['loc']))[:80]}: {fault['msg']}" for fault in error.errors()[:3]]
    return await _refuse(request, unusable("; ".join(faults)))


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    words = {
        404: "there is nothing of this name; /openapi.json lists what there is",
        405: "this cannot be done here; /openapi.json lists what can",
    }
    kind = "unknown" if status == HTTPStatus.NOT_FOUND else "validation"
    return await _refuse(request, RefusedError(words.get(status, status.phrase), status, kind))


def _change(change: Change) -> Response:
    return as_json(asdict(change))


def _info(service: Service, request: Request) -> dict[str, Any]:
    terms, retriever = service.shelf.terms, service.shelf.current.retriever
    backbone, answers = retriever.encoder.backbone, request.app.state.asking
    return {
        "model_id": Path(terms.folder).resolve().name,
        "model_sha": backbone.hash,
        "model_dtype": backbone.config.dtype,
        "model_type": {"embedding": {"pooling": backbone.pooling}},
        "max_concurrent_requests": terms.limits.max_waiting,
        "max_input_length": backbone.max_tokens,
        "max_batch_tokens": terms.limits.max_batch * backbone.max_tokens,
        "max_batch_requests": terms.limits.max_batch,
        "max_client_batch_size": terms.limits.max_texts,
        "version": version("caravan"),
        "documents": len(retriever.catalogue),
        "documents_sha": retriever.catalogue.fingerprint,
        "width": retriever.encoder.width,
        "adapter": retriever.adapter_config.kind,
        "mips": terms.mips,
        "generator": answers.generator.name,
        "calibrated": answers.calibrated,
        "can_change": service.may("write", request),
        "training": request.app.state.following.there,
        "marks": request.app.state.marking.count,
        "changes": retriever.record.get("changes", {}),
    }
