"""The folder behind the service: read, watched, reloaded, and changed so that neither a kill nor a full disk loses it.

A change is on the disk before anybody can see it. Several processes may serve one folder: whoever changes it holds a
lock and begins with what the disk has, and the others notice a new version by its files.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caravan.app.web.batching import Batcher, Timing
from caravan.app.web.limits import Terms, conflict, unavailable, unknown
from caravan.app.web.metrics import Metrics
from caravan.app.web.serving import Asked, Found, Served, bare_rows
from caravan.data.formats import document_from_row
from caravan.data.records import Document
from caravan.data.tables import Row
from caravan.errors import CaravanError, DataError, StorageError
from caravan.files import alone
from caravan.model.changing import with_documents, without_documents
from caravan.model.encoder import Encoder
from caravan.model.retriever import Retriever
from caravan.storage import FILES, fits, load, save

_AT_ONCE = 8  # documents encoded before queries get their turn again
_LOOKS = 5  # at a folder that changes while it is read

log = logging.getLogger("caravan.service")


@dataclass(frozen=True)
class Change:
    """What became of the documents of a request.

    Attributes:
        added: ids that are new.
        replaced: ids whose text or metadata is another now.
        unchanged: ids that were there as they were given.
        removed: ids that are gone.
        documents: how many there are now.
    """

    documents: int
    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


class Shelf:
    """The retriever that is served, and the only place where it becomes another one.

    Attributes:
        current: what is served now.
        batcher: computes its answers.
    """

    def __init__(self, terms: Terms, metrics: Metrics) -> None:
        """Read the folder.

        Raises:
            StorageError: it is missing or damaged.
            BackboneError: its backbone cannot be found or loaded.
        """
        self.terms, self.metrics = terms, metrics
        self.folder = Path(terms.folder)
        self.current = self._read(None)
        if terms.mips:
            served = self.current
            self.current = replace(served, bare_rows=bare_rows(served, None, served.bare_encoder.encode))
        self.batcher: Batcher[Asked, Found] = Batcher(
            lambda batch: self.current.answer(batch), terms.limits, self._observe
        )
        metrics.documents.set(len(self.current.retriever.catalogue))
        self._changing = asyncio.Lock()
        self._refused: object = None

    async def add(self, documents: Sequence[Document], *, replacing: bool) -> Change:
        """Add documents, each with a row made from its text, and save.

        Args:
            documents: checked ones, see `checked_documents`.
            replacing: whether those that are known get the new text and keep their row.

        Raises:
            RefusedError: one is known with another text and `replacing` is not set (409), or the disk does not take
                it (503).
        """

        async def change(retriever: Retriever) -> tuple[Retriever, Change]:
            known = {document.doc_id: document for document in retriever.catalogue}
            same = [document.doc_id for document in documents if known.get(document.doc_id) == document]
            other = [doc.doc_id for doc in documents if doc.doc_id in known and doc.doc_id not in set(same)]
            if other and not replacing:
                raise conflict(
                    f"document {other[0]!r} is there with another text; set replace to true, or change its id"
                )
            fresh = [document for document in documents if document.doc_id not in known]
            vectors = await self._encode(retriever.encoder, [document.content for document in fresh])
            by_id = dict(zip((document.doc_id for document in fresh), vectors, strict=True))
            nothing = vectors.new_zeros(retriever.encoder.width)  # of documents whose rows stay
            given = torch.stack([by_id.get(document.doc_id, nothing) for document in documents])
            changed = with_documents(retriever, documents, given) if fresh or other else retriever
            ids = tuple(document.doc_id for document in fresh)
            return changed, Change(len(changed.catalogue), added=ids, replaced=tuple(other), unchanged=tuple(same))

        return await self._change(change)

    async def remove(self, doc_ids: Collection[str]) -> Change:
        """Remove documents and save.

        Raises:
            RefusedError: one is not known (404), none would be left (409), or the disk does not take it (503).
        """

        async def change(retriever: Retriever) -> tuple[Retriever, Change]:
            known = set(retriever.catalogue.ids)
            for doc_id in doc_ids:
                if doc_id not in known:
                    raise unknown(f"no document {doc_id[:60]!r}; check the id")
            if len(set(doc_ids)) == len(known):
                raise conflict("all documents would be removed and one is needed; add another one first")
            changed = without_documents(retriever, set(doc_ids))
            return changed, Change(len(changed.catalogue), removed=tuple(dict.fromkeys(doc_ids)))

        return await self._change(change)

    async def reload(self) -> Served:
        """Read the folder anew and serve what it holds; no request is dropped.

        Raises:
            StorageError: the folder is damaged; what was served stays.
            BackboneError: its backbone cannot be loaded; what was served stays.
        """
        async with self._changing:
            await self._reload()
            return self.current

    async def watch(self) -> None:
        """Look for a changed folder again and again, and reload it; what is damaged is told once and passed over."""
        while True:
            await asyncio.sleep(self.terms.watch)
            async with self._changing:
                found = stamp(self.folder)
                if found in (self.current.stamp, self._refused):
                    continue
                try:
                    await self._reload()
                except CaravanError as error:
                    self._refused = found
                    log.error("reload refused", extra={"fields": {"error": str(error)}})

    async def _change(self, make: Callable[[Retriever], Awaitable[tuple[Retriever, Change]]]) -> Change:
        async with self._changing:
            with ExitStack() as stack:
                try:
                    await asyncio.to_thread(stack.enter_context, alone(self.folder))
                    if stamp(self.folder) != self.current.stamp:
                        await self._reload()
                except CaravanError as error:
                    raise unavailable(f"the folder cannot be changed now: {error}") from None
                old = self.current.retriever
                retriever, change = await make(old)
                if retriever is old:
                    return change
                retriever.record = _counted(old.record, change)
                try:
                    await asyncio.to_thread(save, retriever, self.folder)
                except StorageError as error:
                    raise unavailable(f"nothing was changed, since it cannot be saved: {error}") from None
                await self._serve(Served(retriever, stamp(self.folder)))
                log.info("documents changed", extra={"fields": {"documents": change.documents}})
                return change

    def _observe(self, timings: Sequence[Timing], waiting: int) -> None:
        self.metrics.waiting.set(waiting)
        self.metrics.batch_size.observe(timings[0].batch_size)
        self.metrics.inference_seconds.observe(timings[0].inference_seconds)
        for timing in timings:
            self.metrics.queue_seconds.observe(timing.queue_seconds)

    async def _reload(self) -> None:
        try:
            served = await asyncio.to_thread(self._read, self.current)
            # Before it is shown: a model that cannot answer must not take the place of one that can.
            await self.batcher.aside(lambda: served.answer([Asked(["a"], "hits", k=1)]))
        except CaravanError:
            self.metrics.reloads.labels("refused").inc()
            raise
        await self._serve(served)
        self.metrics.reloads.labels("done").inc()
        log.info("reloaded", extra={"fields": {"documents": len(served.retriever.catalogue)}})

    async def _serve(self, served: Served) -> None:
        if self.terms.mips:
            before, encoder = self.current, served.bare_encoder
            missing: dict[str, Tensor] = {}
            contents = [document.content for document in served.retriever.catalogue]
            same = before.bare_encoder.key() == encoder.key()
            new = [text for text in contents if not (same and text in before.rows_of_content)]
            missing = dict(zip(new, await self._encode(encoder, new), strict=True))
            rows = bare_rows(served, before, lambda texts: torch.stack([missing[text] for text in texts]))
            served = replace(served, bare_rows=rows)
        self.current = served
        self.metrics.documents.set(len(served.retriever.catalogue))

    async def _encode(self, encoder: Encoder, texts: Sequence[str]) -> Tensor:
        """Encode texts between the queries of others."""
        parts = [torch.empty(0, encoder.width, device=encoder.device)]
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            parts.append(await self.batcher.aside(lambda some=some: encoder.encode(some)))
        return torch.cat(parts)

    def _read(self, before: Served | None) -> Served:
        for _ in range(_LOOKS):
            found = stamp(self.folder)
            shared = before.retriever.encoder.backbone if before is not None else None
            if shared is not None and not fits(self.folder, shared):
                shared = None
            try:
                retriever = load(self.folder, device=self.terms.device, backbone=shared)
            except StorageError:
                if stamp(self.folder) == found:
                    raise
                continue  # it was exchanged between two of its files
            if stamp(self.folder) == found:
                return Served(retriever, found)
        raise StorageError(f"{self.folder}: changes all the time; leave it alone for a moment")


def stamp(folder: Path) -> object:
    """Which version of a folder this is: the files that are the retriever, by place on the disk, size and time."""
    try:
        found = [(path.name, path.stat()) for path in map(folder.joinpath, sorted(FILES)) if path.is_file()]
    except OSError:
        return None
    if not found:
        return None
    return tuple((name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found)


def checked_documents(given: Sequence[Mapping[str, object]]) -> list[Document]:
    """Make documents by the rules of a documents file.

    Args:
        given: `doc_id`, `text`, `title`, `metadata` of each.

    Raises:
        DataError: an id or text is missing, too long or no text, or an id occurs twice.
    """
    documents = [document_from_row(Row("documents", number, cells)) for number, cells in enumerate(given, start=1)]
    seen: set[str] = set()
    for document in documents:
        if document.doc_id in seen:
            raise DataError(f"document id {document.doc_id[:60]!r} is given twice; give each document its own id")
        seen.add(document.doc_id)
    return documents


def _counted(record: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """The record with a count of what was changed since training: its measures are of the documents before."""
    now = {"added": len(change.added), "replaced": len(change.replaced), "removed": len(change.removed)}
    before = record.get("changes")
    earlier = before if isinstance(before, dict) else {}
    return {**record, "changes": {name: count + int(earlier.get(name, 0)) for name, count in now.items()}}
