"""Rows to records: documents and examples from plain files (CSV, TSV, JSON Lines) and from BEIR folders."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from caravan.data.records import Document, Example
from caravan.data.tables import (
    SUFFIXES,
    BadRows,
    Row,
    fault,
    lines,
    listed,
    read_rows,
    shown,
    unprintable,
)
from caravan.errors import DataError

MAX_TEXT_BYTES = 2**20  # no encoder reads that far; a longer text is a mistake, and would be cut without a word
SPLITS = ("train", "validation", "test")
_BEIR_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_GZIP_RATIO = 3  # what prose in gzip usually unpacks to


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a query file hold what.

    Attributes:
        text: the query.
        label: its gold document id or ids.
        separator: splits a cell that names several documents; None: one id a cell.
    """

    text: str = "text"
    label: str = "label"
    separator: str | None = None


class Source(Protocol):
    """Where documents and examples come from; every reader is a generator and never holds its file."""

    name: str

    def documents(self, bad: BadRows) -> Iterator[Document] | None:
        """The documents in file order, or None where the source has labels only."""
        ...

    def examples(self, split: str, bad: BadRows, known: Container[str] | None) -> Iterator[Example] | None:
        """The examples of one of `SPLITS` in file order, or None where there is no such split."""
        ...

    def size_bytes(self, split: str) -> int:
        """About how many bytes of text a split that is there holds, unpacked."""
        ...


def read_documents(path: Path, bad: BadRows, *, id_column: str = "doc_id") -> Iterator[Document]:
    """Stream documents from a file with columns `doc_id,text[,title,metadata]`; others become metadata.

    Args:
        path: CSV, TSV or JSON Lines, also gzipped.
        bad: takes rows without id or text, with a repeated id, or with a text that is too long or no text.
        id_column: the column of the ids; JSON integers are taken as strings.

    Raises:
        DataError: the file is unusable, or a row is malformed and the policy is "fail".
    """
    seen: dict[str, int] = {}
    for row in read_rows(path, bad, required=(id_column, "text")):
        try:
            document = document_from_row(row, id_column)
            if document.doc_id in seen:
                what = f"duplicate document id {shown(document.doc_id)}, first in line {seen[document.doc_id]}"
                raise row.fault(f"{what}; give each document its own id")
        except DataError as error:
            bad.report(error)
            continue
        seen[document.doc_id] = row.line
        yield document


def document_from_row(row: Row, id_column: str = "doc_id") -> Document:
    """Make a document of a row's cells `id_column`, `text` and, if there, `title` and `metadata`; others join it.

    Raises:
        DataError: there is no id or text, or one is too long or no text.
    """
    doc_id = _identifier(row, id_column)
    title = _string(row, "title")
    # Corpora in the wild have documents that are a heading only: the heading is then the text.
    text = title if title.strip() and not _string(row, "text").strip() else _text(row, "text")
    metadata = _others(row, (id_column, "text", "title", "metadata"))
    return Document(doc_id, text, title, metadata | _metadata(row))


def examples_from_rows(
    rows: Iterable[Row], columns: Columns, bad: BadRows, *, split: str, known: Container[str] | None
) -> Iterator[Example]:
    """Stream examples from rows; a `query_id` column names them, else the split and the line do.

    Args:
        rows: of one split.
        columns: which columns to use; the others go to `Example.columns` as strings.
        bad: takes rows with an empty, overlong or broken text, no label, or a label that is not `known`.
        split: the split's name.
        known: the catalogue's document ids; None: any label will do.

    Raises:
        DataError: a row is malformed and the policy is "fail".
    """
    named: set[str] = set()
    for row in rows:
        try:
            example = _example(row, columns, split)
            _check_known(row, example.doc_ids, known)
            if "query_id" in row.cells and example.query_id in named:
                raise row.fault(f"duplicate query id {shown(example.query_id)}; give each query its own")
        except DataError as error:
            bad.report(error)
            continue
        if "query_id" in row.cells:
            named.add(example.query_id)
        yield example


class FileSource:
    """Plain files: a table of queries per split, and perhaps one of documents."""

    def __init__(self, name: str, splits: Mapping[str, Path], documents: Path | None, columns: Columns) -> None:
        self.name = name
        self._splits = splits
        self._documents = documents
        self._columns = columns

    def documents(self, bad: BadRows) -> Iterator[Document] | None:
        """See `Source.documents`."""
        return read_documents(self._documents, bad) if self._documents else None

    def examples(self, split: str, bad: BadRows, known: Container[str] | None) -> Iterator[Example] | None:
        """See `Source.examples`."""
        path = self._splits.get(split)
        if path is None:
            return None
        rows = read_rows(path, bad, required=(self._columns.text, self._columns.label))
        return examples_from_rows(rows, self._columns, bad, split=split, known=known)

    def size_bytes(self, split: str) -> int:
        """See `Source.size_bytes`."""
        return text_bytes(self._splits[split])


class BeirSource:
    """A BEIR folder (arXiv:2104.08663): `corpus.jsonl`, `queries.jsonl`, `qrels/{train,dev,test}.tsv`.

    A qrels row is `query-id, corpus-id, score`, with or without a header line; documents with a score above 0 are
    gold. Queries come in the order of `queries.jsonl`.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        self._corpus = _required(folder, "corpus")
        self._queries = _required(folder, "queries")
        found = {split: folder / "qrels" / f"{name}.tsv" for split, name in _BEIR_SPLITS.items()}
        self._judgements = {split: path for split, path in found.items() if path.exists()}
        if "train" not in self._judgements:
            raise fault(folder, None, "a BEIR folder without qrels/train.tsv; there is nothing to train on")

    def documents(self, bad: BadRows) -> Iterator[Document]:
        """See `Source.documents`."""
        return read_documents(self._corpus, bad, id_column="_id")

    def examples(self, split: str, bad: BadRows, known: Container[str] | None) -> Iterator[Example] | None:
        """See `Source.examples`."""
        path = self._judgements.get(split)
        return None if path is None else self._join(path, bad, known)

    def size_bytes(self, split: str) -> int:
        """See `Source.size_bytes`."""
        return text_bytes(self._queries)

    def _join(self, path: Path, bad: BadRows, known: Container[str] | None) -> Iterator[Example]:
        gold: dict[str, dict[str, None]] = {}
        judged: dict[str, Row] = {}  # the first judgement of each query that no query line has answered yet
        for row, query_id, doc_id, score in _read_judgements(path, bad):
            try:
                _check_known(row, (doc_id,), known)
            except DataError as error:
                bad.report(error)
                continue
            judged.setdefault(query_id, row)
            if score > 0:
                gold.setdefault(query_id, {})[doc_id] = None
        for row in read_rows(self._queries, bad, required=("_id", "text")):
            try:
                query_id = _identifier(row, "_id")
                if query_id not in judged and query_id not in gold:
                    continue
                if judged.pop(query_id, None) is None:
                    raise row.fault(f"duplicate query id {shown(query_id)}; give each query its own")
                text = _text(row, "text")
                columns = _others(row, ("_id", "text", "metadata")) | _metadata(row)
            except DataError as error:
                bad.report(error)
                continue
            if query_id in gold:
                yield Example(text, tuple(gold[query_id]), query_id, columns)
        for query_id, row in judged.items():
            bad.report(row.fault(f"unknown query {shown(query_id)}; it is not in {self._queries.name}"))


def find_table(folder: Path, stem: str) -> Path | None:
    """The file `stem.csv`, `.tsv` or `.jsonl` (also `.gz`) of a folder, or None.

    Raises:
        DataError: there are several.
    """
    names = [f"{stem}{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz")]
    found = [name for name in names if (folder / name).exists()]
    if len(found) > 1:
        raise fault(folder, None, f"{listed(found)} are both there; keep one")
    return folder / found[0] if found else None


def text_bytes(path: Path) -> int:
    """About how many bytes a file holds once unpacked; 0 where it cannot be told."""
    try:
        size = path.stat().st_size
    except (OSError, ValueError):
        return 0  # opening it reports what is wrong
    return size * _GZIP_RATIO if path.name.lower().endswith(".gz") else size


def _required(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.jsonl", f"{stem}.jsonl.gz"):
        if (folder / name).exists():
            return folder / name
    raise fault(folder, None, f"a BEIR folder without {stem}.jsonl; add it")


def _read_judgements(path: Path, bad: BadRows) -> Iterator[tuple[Row, str, str, float]]:
    empty = True
    for number, line in enumerate(lines(path), start=1):
        cells = line.rstrip("\r\n").split("\t")
        row = Row(str(path), number, {})
        if not line.strip() or (number == 1 and len(cells) == 3 and _number(cells[2]) is None):
            continue
        empty = False
        score = _number(cells[2]) if len(cells) == 3 else None
        if score is None:
            what = f"{shown(line.rstrip())} is no judgement; write query id, document id and a number, split by tabs"
            bad.report(row.fault(what))
            continue
        yield row, cells[0], cells[1], score
    if empty:
        raise fault(path, None, "no judgements; write query id, document id and a number a line, split by tabs")


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _example(row: Row, columns: Columns, split: str) -> Example:
    text = _text(row, columns.text)
    value = row.cells.get(columns.label)
    values = cast("list[object]", value) if isinstance(value, list) else [value]
    if columns.separator and isinstance(value, str):
        values = [part.strip() for part in value.split(columns.separator)]
    doc_ids = tuple(dict.fromkeys(_as_identifier(row, columns.label, value) for value in values))
    if not doc_ids:
        raise row.fault(f"{shown(columns.label)} is empty; name at least one document")
    query_id = _identifier(row, "query_id") if "query_id" in row.cells else f"{split}-{row.line}"
    return Example(text, doc_ids, query_id, _others(row, (columns.text, columns.label, "query_id")))


def _check_known(row: Row, doc_ids: Iterable[str], known: Container[str] | None) -> None:
    for doc_id in doc_ids:
        if known is not None and doc_id not in known:
            what = f"unknown label {shown(doc_id)}: no document has this id"
            raise row.fault(f"{what}; add it to the documents, or take the row out")


def _identifier(row: Row, column: str) -> str:
    return _as_identifier(row, column, row.cells.get(column))


def _as_identifier(row: Row, column: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise row.fault(f"{shown(column)} is {shown(value)}; an id is a string or an integer")
    if not value or not value.strip():
        raise row.fault(f"{shown(column)} is empty; give an id")
    return _checked(row, column, value)


def _string(row: Row, column: str) -> str:
    value = row.cells.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise row.fault(f"{shown(column)} is {shown(value)}; it must be a string")
    return _checked(row, column, value)


def _text(row: Row, column: str) -> str:
    text = _string(row, column)
    if not text or text.isspace():
        raise row.fault(f"{shown(column)} is empty; give a text, or take the row out")
    return text


def _checked(row: Row, column: str, value: str) -> str:
    reason = unprintable(value)
    if reason:
        raise row.fault(f"{shown(column)} holds {reason}: {shown(value)}; save the file as UTF-8 text without it")
    if len(value) * 4 > MAX_TEXT_BYTES and len(value.encode("utf-8")) > MAX_TEXT_BYTES:
        raise row.fault(f"{shown(column)} is longer than {MAX_TEXT_BYTES:,} bytes; cut it into parts")
    return value


def _others(row: Row, used: Iterable[str]) -> dict[str, str]:
    names = [name for name in row.cells if name not in used]
    return {_checked(row, name, name): _checked(row, name, _plain(row, name, row.cells[name])) for name in names}


def _plain(row: Row, column: str, value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        raise row.fault(f"{shown(column)} holds a value nested too deep; make it flat") from None


def _metadata(row: Row) -> dict[str, str]:
    value = row.cells.get("metadata")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise row.fault(f"'metadata' is {shown(value)}; it must be a JSON object") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise row.fault(f"'metadata' is {shown(value)}; it must be a JSON object")
    return _others(Row(row.source, row.line, cast("dict[str, object]", value)), ())
