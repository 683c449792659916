"""One file as rows: CSV, TSV and JSON Lines, plain or gzipped, streamed; every fault names its file and line."""

import codecs
import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from caravan.errors import DataError

MAX_LINE_BYTES = 16 * 2**20  # a longer line is a binary file or a quote nobody closed; reading on would fill memory
SUFFIXES = (".csv", ".tsv", ".jsonl")


def fault(source: object, line: int | None, what: str) -> DataError:
    """A `DataError` of one printable line: source, line number (1-based) when known, what was got and the remedy."""
    message = f"{source}: {what}" if line is None else f"{source}, line {line}: {what}"
    return DataError(" ".join(message.split()).encode("utf-8", "backslashreplace").decode("utf-8"))


def shown(value: object, *, limit: int = 60) -> str:
    """A value as it may stand in a message: `repr`, cut at `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def listed(names: Sequence[str], *, limit: int = 12) -> str:
    """Names as they may stand in a message, the first `limit` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name) for name in names[:limit]) + more


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        source: the file's path, or what else the row comes from.
        line: 1-based line at which the row begins (of a source without lines: the row's number).
        cells: value by column name; strings from CSV and TSV, any JSON value from JSON Lines.
    """

    source: str
    line: int
    cells: Mapping[str, object]

    def fault(self, what: str) -> DataError:
        """A `DataError` that names this row."""
        return fault(self.source, self.line, what)


class BadRows:
    """What becomes of malformed rows: the first one stops everything, or all are left out and counted.

    Attributes:
        policy: "fail" or "skip".
        count: rows left out so far.
        first: the fault of the first row left out.
    """

    def __init__(self, policy: Literal["fail", "skip"] = "fail") -> None:
        self.policy = policy
        self.count = 0
        self.first: DataError | None = None

    def report(self, error: DataError) -> None:
        """Take note of a malformed row.

        Raises:
            DataError: the error itself, when the policy is "fail".
        """
        if self.policy == "fail":
            raise error
        self.count += 1
        self.first = self.first or error


def table_suffix(path: Path) -> str | None:
    """Which of `SUFFIXES` a file name ends with, `.gz` aside; None for any other file."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_rows(path: Path, bad: BadRows, *, required: Sequence[str] = ()) -> Iterator[Row]:
    """Stream the rows of a CSV, TSV or JSON Lines file; blank lines are passed over.

    CSV and TSV have a header line and follow RFC 4180 (a cell with the separator, a quote or a line break stands in
    double quotes). A UTF-8 byte order mark and CRLF line ends are accepted.

    Args:
        path: a file named `.csv`, `.tsv` or `.jsonl`, or one of these and `.gz`.
        bad: takes rows with a wrong number of cells, broken quotes, or no JSON object.
        required: columns that must be there.

    Raises:
        DataError: the file cannot be read as a whole (missing, empty, binary, truncated, wrong columns), or a row is
            malformed and the policy is "fail".
    """
    suffix = table_suffix(path)
    if suffix is None:
        raise fault(path, None, "unknown kind of file; name it .csv, .tsv or .jsonl (each also .gz)")
    if suffix == ".jsonl":
        return _json_rows(path, bad, required)
    return _csv_rows(path, "," if suffix == ".csv" else "\t", bad, required)


def lines(path: Path) -> Iterator[str]:
    """Stream a UTF-8 file's lines with their ends; bytes that are not UTF-8 become lone surrogates.

    Raises:
        DataError: the file cannot be opened or read on, is no gzip file although its name says so, or has a line of
            more than `MAX_LINE_BYTES`.
    """
    number = 0
    try:
        with _open(path) as stream:
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise fault(path, number, f"longer than {MAX_LINE_BYTES:,} bytes; is this a text file?")
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                yield raw.decode("utf-8", "surrogateescape")
    except EOFError:
        raise fault(path, number + 1, "the gzip file ends too early; fetch or write it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        remedy = "fetch it again, or drop .gz from the name if it is not compressed"
        raise fault(path, number + 1, f"not a sound gzip file ({error}); {remedy}") from None
    except FileNotFoundError:
        raise fault(path, None, "no such file; check the path") from None
    except IsADirectoryError:
        raise fault(path, None, "a folder where a file is expected; give the path of the file in it") from None
    except OSError as error:
        raise fault(path, None, f"cannot be read: {error.strerror or error}; check the file and its rights") from None
    except ValueError as error:  # a NUL in its name
        raise fault(shown(str(path)), None, f"no usable path: {error}; check it") from None


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb")


def _csv_rows(path: Path, delimiter: str, bad: BadRows, required: Sequence[str]) -> Iterator[Row]:
    # The limit belongs to the whole process: raise it for long texts, never lower what somebody else set.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    empty = True
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # A quote that is never closed has swallowed what follows: there is no next row to go on with.
            if "unexpected end of data" in str(error) or "field limit" in str(error):
                what = "the row that begins here opens a quote that is never closed; write a quote inside a cell as two"
                raise fault(path, line, what) from None
            what = f"broken CSV ({error}); put the cell in double quotes and double those inside it"
            if header is None:
                raise fault(path, line, what) from None
            empty = False
            bad.report(fault(path, line, what))
            continue
        if not cells:
            continue
        if header is None:
            header = _header(path, line, cells, required)
            continue
        empty = False
        if len(cells) != len(header):
            what = f"{len(cells)} cells, but the header has {len(header)} ({listed(header)})"
            bad.report(fault(path, line, f"{what}; put cells that hold {delimiter!r} in double quotes"))
            continue
        yield Row(str(path), line, dict(zip(header, cells, strict=True)))
    if header is None:
        raise fault(path, None, "an empty file; give a header line and rows")
    if empty:
        raise fault(path, None, "a header line but no rows; add some, or leave the file out")


def _header(path: Path, line: int, cells: Sequence[str], required: Sequence[str]) -> list[str]:
    names = [name.strip() for name in cells]
    if any(unprintable(name) for name in names):
        raise fault(path, line, "not UTF-8 text in the header line; give a text file (uncompressed, or named .gz)")
    _check_names(path, line, names, required)
    return names


def _check_names(path: object, line: int, names: Sequence[str], required: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        repeated, _ = Counter(names).most_common(1)[0]
        raise fault(path, line, f"the column {shown(repeated)} occurs more than once; rename or drop one")
    missing = [name for name in required if name not in names]
    if missing:
        remedy = "rename the column, or say which one to use (text_column, label_column)"
        raise fault(path, line, f"no column {listed(missing)}; found {listed(names) or 'none'}; {remedy}")


def unprintable(text: str) -> str | None:
    """What makes a text unusable everywhere downstream: a NUL character, or half of a surrogate pair; else None."""
    if "\0" in text:
        return "a NUL character"
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "bytes that are not UTF-8, or a lone surrogate"
    return None


def _json_rows(path: Path, bad: BadRows, required: Sequence[str]) -> Iterator[Row]:
    empty = True
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        empty = False
        try:
            cells = _json_object(path, number, line, required)
        except DataError as error:
            bad.report(error)
            continue
        yield Row(str(path), number, cells)
    if empty:
        raise fault(path, None, "an empty file; give one JSON object a line")


def _json_object(path: Path, number: int, line: str, required: Sequence[str]) -> dict[str, object]:
    def pairs_to_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        _check_names(path, number, [name for name, _ in pairs], ())
        return dict(pairs)

    try:
        value: object = json.loads(line, object_pairs_hook=pairs_to_object)
    except (ValueError, RecursionError) as error:
        what = f"not JSON ({error}); got {shown(line.rstrip())}"
        raise fault(path, number, f"{what}; write one JSON object a line, in UTF-8") from None
    if not isinstance(value, dict):
        raise fault(path, number, f"JSON, but no object: {shown(line.rstrip())}; write one JSON object a line")
    cells = cast("dict[str, object]", value)
    _check_names(path, number, list(cells), required)
    return cells
