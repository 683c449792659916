"""Rankings and gold documents as TREC files, so that trec_eval and its kin can check every figure."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from caravan.errors import StorageError
from caravan.files import whole_file
from caravan.training.evaluation import Ranking

# What would split a column, end a line or cannot be UTF-8; and "%" itself, so that no two ids become one.
_UNWRITABLE = re.compile("[\\s%\x00-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")


def write_run(
    path: str | Path, ranking: Ranking, query_ids: Sequence[str], doc_ids: Sequence[str], *, tag: str = "caravan"
) -> None:
    """Write a ranking as a TREC run: `query-id Q0 document-id rank score tag`, ranks from 1.

    Readers of the format ignore the rank and sort by score, equal scores by document id. Therefore a score that
    does not lie below the one before it is written as the next smaller float32: the file keeps the ranking's order.

    Ids and tag are percent-encoded (RFC 3986, UTF-8) in white space, control characters, lone surrogates and "%",
    and left as they are otherwise; `urllib.parse.unquote(id, errors="surrogatepass")` gives the id back.

    Args:
        path: the file; replaced if there. It is whole or, on an error, as it was.
        ranking: of Q queries.
        query_ids: Q names, all different.
        doc_ids: the name of each catalogue row, all different.
        tag: the name of the run.

    Raises:
        StorageError: the file cannot be written, an id is empty or used twice, or the ids do not fit the ranking.
    """
    queries = _columns(query_ids, "query", len(ranking.rows))
    documents = _columns(doc_ids, "document", int(ranking.rows.max()) + 1)
    run = _column(tag, "run tag")
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_run_lines(ranking, queries, documents, run))


def write_qrels(
    path: str | Path, gold: Sequence[Sequence[int]], query_ids: Sequence[str], doc_ids: Sequence[str]
) -> None:
    """Write gold documents as TREC qrels: `query-id 0 document-id 1`.

    Args:
        path: the file; replaced if there. It is whole or, on an error, as it was.
        gold: for each of Q queries its gold catalogue rows.
        query_ids: Q names, all different; encoded as in `write_run`.
        doc_ids: the name of each catalogue row, all different; encoded as in `write_run`.

    Raises:
        StorageError: the file cannot be written, an id is empty or used twice, or the ids do not fit the gold rows.
    """
    queries = _columns(query_ids, "query", len(gold))
    documents = _columns(doc_ids, "document", max((max(rows, default=-1) for rows in gold), default=-1) + 1)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for query, rows in zip(queries, gold, strict=True):
            file.writelines(f"{query} 0 {documents[row]} 1\n" for row in rows)


def _run_lines(ranking: Ranking, queries: list[str], documents: list[str], tag: str) -> Iterator[str]:
    scores = ranking.scores.astype(np.float32)
    for place in range(1, scores.shape[1]):
        below = np.nextafter(scores[:, place - 1], np.float32(-np.inf))
        scores[:, place] = np.minimum(scores[:, place], below)
    for query, rows, row_scores in zip(queries, ranking.rows, scores, strict=True):
        for place, (row, score) in enumerate(zip(rows.tolist(), row_scores.tolist(), strict=True), start=1):
            # Nine significant digits tell any two float32 apart.
            yield f"{query} Q0 {documents[row]} {place} {score:.9g} {tag}\n"


def _columns(ids: Sequence[str], kind: str, needed: int) -> list[str]:
    if len(ids) < needed or (kind == "query" and len(ids) != needed):
        raise StorageError(f"{len(ids)} {kind} ids where the ranking or gold rows need {needed}; give one for each")
    columns = [_column(name, f"{kind} id") for name in ids]
    if len(set(columns)) != len(columns):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))
        raise StorageError(f"the {kind} id {twice!r} is used twice; a TREC file needs all {kind} ids different")
    return columns


def _column(name: str, kind: str) -> str:
    if not name:
        raise StorageError(f"a {kind} is empty, and a TREC file has no empty column; give it a name")
    return _UNWRITABLE.sub(lambda match: quote(match[0], safe="", errors="surrogatepass"), name)
