import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caravan.data import tables
from caravan.data.tables import BadRows, read_rows
from caravan.errors import DataError


def rows_of(folder: Path, name: str, content: bytes, **options) -> list[tuple[int, dict]]:
    path = folder / name
    path.write_bytes(content)
    return [(row.line, dict(row.cells)) for row in read_rows(path, BadRows(), **options)]


def refusal(folder: Path, name: str, content: bytes, **options) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(folder, name, content, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message


def test_csv_rows_carry_the_line_at_which_they_begin(tmp_path):
    rows = rows_of(tmp_path, "a.csv", b'text,label\n"two\nlines",x\n\nlast,y\n')
    assert rows == [(2, {"text": "two\nlines", "label": "x"}), (5, {"text": "last", "label": "y"})]


def test_a_tsv_file_is_split_at_tabs_only(tmp_path):
    assert rows_of(tmp_path, "a.tsv", b"text\tlabel\na, b\tx\n") == [(2, {"text": "a, b", "label": "x"})]


def test_json_lines_keep_their_value_types(tmp_path):
    rows = rows_of(tmp_path, "a.jsonl", b'{"text": "a", "label": ["x", 3]}\n\n{"text": "b", "label": 7}\n')
    assert rows == [(1, {"text": "a", "label": ["x", 3]}), (3, {"text": "b", "label": 7})]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.CSV.GZ"])
def test_a_gzipped_file_reads_like_the_plain_one(tmp_path, name):
    assert rows_of(tmp_path, name, gzip.compress(b"text,label\na,x\n")) == [(2, {"text": "a", "label": "x"})]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_and_crlf_are_accepted(tmp_path, name):
    content = b"text,label\r\na,x\r\n" if name == "a.csv" else b'{"text": "a", "label": "x"}\r\n'
    [(_, cells)] = rows_of(tmp_path, name, b"\xef\xbb\xbf" + content)
    assert cells == {"text": "a", "label": "x"}


def test_a_cell_longer_than_the_csv_module_allows_by_default_is_read(tmp_path):
    long = "word " * 100_000
    [(_, cells)] = rows_of(tmp_path, "a.csv", f"text,label\n{long},x\n".encode())
    assert cells["text"] == long


def test_a_field_size_limit_set_higher_by_somebody_else_is_left_alone(tmp_path):
    before = csv.field_size_limit(2**30)
    try:
        rows_of(tmp_path, "a.csv", b"text,label\na,x\n")
        assert csv.field_size_limit() == 2**30
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "empty file"),
        ("a.jsonl", b" \n\n", "empty file"),
        ("a.csv", b"text,label\n", "a header line but no rows"),
        ("a.csv", b"\x7fELF\0\0,label\nx,y\n", "line 1: not UTF-8 text"),
        ("a.csv", "text,label\na,x\n".encode("utf-16"), "line 1: not UTF-8 text"),
        ("a.csv", gzip.compress(b"text,label\na,x\n"), "line 1: not UTF-8 text"),
        ("a.csv", b"text,text,label\na,b,c\n", "line 1: the column 'text' occurs more than once"),
        ("a.csv", b"query,intent\na,b\n", "line 1: no column 'text', 'label'; found 'query', 'intent'"),
        ("a.csv", b"text,label\na,x\nb,y,z\n", "line 3: 3 cells, but the header has 2 ('text', 'label')"),
        ("a.csv", b"text,label\na\n", "line 2: 1 cells, but the header has 2"),
        ("a.csv", b'text,label\n"a"b,x\n', "line 2: broken CSV"),
        ("a.csv", b'text,label\na,x\n"b,y\nc,z\n', "line 3: the row that begins here opens a quote"),
        ("a.csv", b'"text,label\n', "line 1: the row that begins here opens a quote"),
        ("a.csv", b"text,label\ra,x\r", "line 1: broken CSV"),
        ("a.jsonl", b'{"text": "a", "label": "x"}\nhello\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a", "label": "x"\n', "line 1: not JSON"),
        ("a.jsonl", b'["a", "x"]\n', "line 1: JSON, but no object"),
        ("a.jsonl", b'{"text": "a", "text": "b", "label": "x"}\n', "'text' occurs more than once"),
        ("a.jsonl", b'{"text": "a", "intent": "x"}\n', "line 1: no column 'label'; found 'text', 'intent'"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
        ("a.csv.gz", b"text,label\na,x\n", "not a sound gzip file"),
        ("a.csv.gz", gzip.compress(b"text,label\n" + b"a,x\n" * 9)[:-9], "the gzip file ends too early"),
        ("a.csv.gz", gzip.compress(b"text,label\na,x\n") + b"more", "not a sound gzip file"),
        ("a.txt", b"text,label\na,x\n", "unknown kind of file"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, said):
    assert said in refusal(tmp_path, name, content, required=("text", "label"))


def test_a_damaged_gzip_stream_is_refused(tmp_path):
    content = bytearray(gzip.compress(bytes(range(256)) * 50))
    content[20:60] = b"\xff" * 40
    assert "not a sound gzip file" in refusal(tmp_path, "a.csv.gz", bytes(content))


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 1000)
    assert "line 2: longer than 1,000 bytes" in refusal(tmp_path, "a.csv", b"text,label\n" + b"a" * 1001)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        list(read_rows(tmp_path / "gone.csv", BadRows()))
    with pytest.raises(DataError, match=r"folder\.csv: a folder where a file is expected"):
        list(read_rows(tmp_path / "folder.csv", BadRows()))


def test_an_unreadable_file_is_reported_with_the_reason(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.csv: cannot be read: Permission denied; check"):
        list(read_rows(tmp_path / "a.csv", BadRows()))


def test_a_row_with_broken_quotes_can_be_skipped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\n"a"b,x\nc,y\nd\n')
    bad = BadRows("skip")
    assert [row.line for row in read_rows(path, bad)] == [3]
    assert bad.count == 2
    assert "line 2" in str(bad.first)


def test_an_unclosed_quote_fails_even_where_bad_rows_are_skipped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\na,x\n"b,y\n')
    with pytest.raises(DataError, match="line 3"):
        list(read_rows(path, BadRows("skip")))


def test_a_file_is_streamed_and_not_read_ahead(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"broken\n")
    rows = read_rows(path, BadRows())
    assert next(rows).cells == {"text": "a"}
    with pytest.raises(DataError, match="line 2"):
        next(rows)


def test_a_message_stays_one_printable_line_whatever_the_path_and_value(tmp_path):
    error = tables.fault("a\nb\udc80", 3, "got " + tables.shown("x\n" * 100))
    assert str(error) == "a b\\udc80, line 3: got '" + "x\\n" * 19 + "x\\..."


# Fuzzing: whatever the bytes, rows or a one-line DataError.
SNIPPETS = st.sampled_from(
    [
        b"text,label\n",
        b'"',
        b",",
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff\xfe",
        b'{"text": "',
        b'"}',
        b"[",
        b"\\ud800",
        b"a\tb",
        b"1",
    ]
)
BYTES = st.one_of(st.binary(max_size=200), st.lists(SNIPPETS, max_size=30).map(b"".join))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES, name=st.sampled_from(["f.csv", "f.tsv", "f.jsonl", "f.csv.gz"]), skip=st.booleans())
def test_any_bytes_give_rows_or_a_one_line_error(tmp_path, content, name, skip):
    path = tmp_path / name
    path.write_bytes(content)
    rows, message = [], "no fault"
    try:
        rows.extend(read_rows(path, BadRows("skip" if skip else "fail")))
    except DataError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert all(row.line >= 1 for row in rows)


CELL = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5), name=st.sampled_from(["r.csv", "r.tsv", "r.jsonl"])
)
def test_rows_survive_a_round_trip(tmp_path, cells, name):
    if name == "r.jsonl":
        content = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in cells)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter="," if name == "r.csv" else "\t")
        writer.writerows([("text", "label"), *cells])
        content = buffer.getvalue()
    rows = rows_of(tmp_path, name, content.encode())
    assert [(row["text"], row["label"]) for _, row in rows] == cells
