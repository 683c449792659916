import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caravan.data.formats import (
    BeirSource,
    Columns,
    FileSource,
    examples_from_rows,
    find_table,
    read_documents,
    text_bytes,
)
from caravan.data.records import Document, Example
from caravan.data.tables import BadRows, read_rows
from caravan.errors import DataError

MEBIBYTE = 2**20


def documents(folder: Path, content: str | bytes, *, name: str = "documents.jsonl", bad: BadRows | None = None):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_documents(path, bad or BadRows()))


def examples(
    folder: Path,
    content: str | bytes,
    *,
    name: str = "train.csv",
    columns: Columns | None = None,
    bad: BadRows | None = None,
    known=None,
):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = bad or BadRows()
    return list(examples_from_rows(read_rows(path, bad), columns or Columns(), bad, split="train", known=known))


def test_other_columns_of_a_documents_file_become_metadata(tmp_path):
    content = "doc_id,text,title,answer,topic\n7,body,head,because,\n"
    [document] = documents(tmp_path, content, name="documents.csv")
    assert document == Document("7", "body", "head", {"answer": "because", "topic": ""})


@pytest.mark.parametrize("name", ["documents.csv", "documents.jsonl"])
def test_a_metadata_column_is_a_json_object(tmp_path, name):
    content = 'doc_id,text,metadata\n1,a,"{""url"": ""u"", ""year"": 2020, ""tags"": [""é""]}"\n'
    if name == "documents.jsonl":
        content = '{"doc_id": 1, "text": "a", "metadata": {"url": "u", "year": 2020, "tags": ["é"]}}\n'
    [document] = documents(tmp_path, content, name=name)
    assert document.metadata == {"url": "u", "year": "2020", "tags": '["é"]'}


def test_a_document_that_is_only_a_heading_has_it_as_its_text(tmp_path):
    [document] = documents(tmp_path, '{"doc_id": "a", "text": "", "title": "Heading"}\n')
    assert document.text == "Heading"
    assert document.content == "Heading"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ['{"doc_id": "a", "text": "x"}', '{"doc_id": "a", "text": "y"}'],
            "line 2: duplicate document id 'a', first in line 1",
        ),
        (['{"doc_id": "a", "text": ""}'], "line 1: 'text' is empty"),
        (['{"doc_id": "a", "text": null, "title": " "}'], "line 1: 'text' is empty"),
        (['{"doc_id": "", "text": "x"}'], "line 1: 'doc_id' is empty"),
        (['{"doc_id": 1.5, "text": "x"}'], "line 1: 'doc_id' is 1.5; an id is a string or an integer"),
        (['{"doc_id": true, "text": "x"}'], "line 1: 'doc_id' is True"),
        (['{"doc_id": "a", "text": 5}'], "line 1: 'text' is 5; it must be a string"),
        (['{"doc_id": "a", "text": "x", "metadata": [1]}'], "line 1: 'metadata' is [1]; it must be a JSON object"),
        (['{"doc_id": "a", "text": "x", "metadata": "{"}'], "line 1: 'metadata' is '{'; it must be a JSON object"),
        (['{"doc_id": "a", "text": "x\\u0000"}'], "line 1: 'text' holds a NUL character"),
        (
            ['{"doc_id": "\\ud800", "text": "x"}'],
            "line 1: 'doc_id' holds bytes that are not UTF-8, or a lone surrogate",
        ),
    ],
)
def test_a_malformed_document_is_refused_with_its_line(tmp_path, lines, said):
    with pytest.raises(DataError) as caught:
        documents(tmp_path, "\n".join(lines))
    assert said in str(caught.value)
    bad = BadRows("skip")
    assert len(documents(tmp_path, "\n".join(lines), bad=bad)) == len(lines) - 1
    assert bad.count == 1


def test_other_columns_of_an_example_are_kept_as_strings(tmp_path):
    content = '{"text": "q", "label": 3, "site": "north", "year": 1999, "open": true, "note": null}\n'
    [example] = examples(tmp_path, content, name="train.jsonl")
    columns = {"site": "north", "year": "1999", "open": "true", "note": ""}
    assert example == Example("q", ("3",), "train-1", columns)


def test_several_gold_documents_come_from_a_list_or_a_separator(tmp_path):
    [listed] = examples(tmp_path, '{"text": "q", "label": ["b", 2, "b"]}\n', name="train.jsonl")
    [split] = examples(tmp_path, "text,label\nq,b | 2|b\n", columns=Columns(separator="|"))
    [whole] = examples(tmp_path, "text,label\nq,b | 2|b\n")
    assert listed.doc_ids == split.doc_ids == ("b", "2")
    assert whole.doc_ids == ("b | 2|b",)


def test_columns_can_have_other_names(tmp_path):
    [example] = examples(tmp_path, "query,intent\nq,x\n", columns=Columns("query", "intent"))
    assert (example.text, example.doc_ids, example.columns) == ("q", ("x",), {})


def test_a_query_id_column_names_the_examples_and_must_not_repeat(tmp_path):
    [example] = examples(tmp_path, "text,label,query_id\nq,x,Q1\n")
    assert example.query_id == "Q1"
    assert example.columns == {}
    with pytest.raises(DataError, match="line 3: duplicate query id 'Q1'"):
        examples(tmp_path, "text,label,query_id\nq,x,Q1\nr,x,Q1\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "", "label": "x"}', "'text' is empty"),
        ('{"text": " \\t\\u00a0", "label": "x"}', "'text' is empty"),
        ('{"text": "q", "label": ""}', "'label' is empty"),
        ('{"text": "q", "label": null}', "'label' is empty"),
        ('{"text": "q", "label": []}', "'label' is empty"),
        ('{"text": "q", "label": ["x", ""]}', "'label' is empty"),
        ('{"text": "q", "label": {"a": 1}}', "'label' is {'a': 1}; an id is a string or an integer"),
        ('{"text": "q", "label": false}', "'label' is False; an id is a string or an integer"),
        ('{"text": ["q"], "label": "x"}', "'text' is ['q']; it must be a string"),
        ('{"text": "q\\ud800", "label": "x"}', "'text' holds bytes that are not UTF-8, or a lone surrogate"),
        ('{"text": "q\\u0000", "label": "x"}', "'text' holds a NUL character"),
        (
            '{"text": "q", "label": "x", "site": "\\ud800"}',
            "'site' holds bytes that are not UTF-8, or a lone surrogate",
        ),
        ('{"text": "q", "label": "x", "\\ud800": "s"}', "holds bytes that are not UTF-8, or a lone surrogate"),
        ('{"text": "q", "label": "gone"}', "unknown label 'gone': no document has this id"),
    ],
)
def test_a_malformed_example_is_refused_with_its_line_or_skipped(tmp_path, line, said):
    content = f'{{"text": "first", "label": "x"}}\n{line}\n'
    with pytest.raises(DataError) as caught:
        examples(tmp_path, content, name="train.jsonl", known={"x"})
    assert "train.jsonl, line 2: " in str(caught.value)
    assert said in str(caught.value)
    bad = BadRows("skip")
    assert len(examples(tmp_path, content, name="train.jsonl", known={"x"}, bad=bad)) == 1
    assert bad.count == 1


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path):
    bad = BadRows("skip")
    [example] = examples(tmp_path, b"text,label\ncaf\xe9,x\ncafe,x\n", bad=bad)
    assert example.text == "cafe"
    assert "line 2: 'text' holds bytes that are not UTF-8" in str(bad.first)


def test_a_text_of_one_mebibyte_is_read_and_one_byte_more_is_refused(tmp_path):
    [example] = examples(tmp_path, "text,label\n" + "a" * MEBIBYTE + ",x\n")
    assert len(example.text) == MEBIBYTE
    with pytest.raises(DataError, match=r"line 2: 'text' is longer than 1,048,576 bytes"):
        examples(tmp_path, "text,label\n" + "é" * (MEBIBYTE // 2) + "a,x\n")


def test_a_deeply_nested_extra_column_is_kept_or_refused_but_never_crashes(tmp_path):
    for depth in range(800, 1001):
        content = '{"text": "q", "label": "x", "deep": ' + "[" * depth + "]" * depth + "}\n"
        message = refusal(lambda content=content: examples(tmp_path, content, name="train.jsonl"))
        assert message is None or "line 1" in message


def test_two_files_for_one_split_are_refused(tmp_path):
    (tmp_path / "train.csv").touch()
    assert find_table(tmp_path, "train") == tmp_path / "train.csv"
    (tmp_path / "train.jsonl.gz").touch()
    with pytest.raises(DataError, match=r"'train\.csv', 'train\.jsonl\.gz' are both there; keep one"):
        find_table(tmp_path, "train")


def test_the_size_of_a_gzipped_file_is_scaled_up(tmp_path):
    for name in ("a.csv", "a.csv.gz"):
        (tmp_path / name).write_bytes(b"x" * 100)
    assert text_bytes(tmp_path / "a.csv") == 100
    assert text_bytes(tmp_path / "a.csv.gz") == 300
    assert text_bytes(tmp_path / "gone.csv") == 0


def refusal(read) -> str | None:
    try:
        read()
    except DataError as error:
        return str(error)
    return None


# BEIR
def beir(folder: Path, *, qrels: str, queries: str | None = None) -> BeirSource:
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "One", "text": "first"}\n'
        '{"_id": "d2", "title": "", "text": "second", "metadata": {"url": "u"}}\n'
    )
    default = '{"_id": "q1", "text": "uno"}\n{"_id": "q2", "text": "dos", "metadata": {"site": "s"}}\n'
    (folder / "queries.jsonl").write_text(queries or default)
    (folder / "qrels" / "train.tsv").write_text(qrels)
    return BeirSource(folder)


def judged(source: BeirSource, *, split: str = "train", bad: BadRows | None = None) -> list[Example]:
    stream = source.examples(split, bad or BadRows(), {"d1", "d2"})
    assert stream is not None
    return list(stream)


HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize("header", [HEADER, ""])
def test_a_beir_folder_gives_every_document_with_a_positive_score(tmp_path, header):
    source = beir(tmp_path, qrels=header + "q2\td2\t2\nq1\td2\t0\nq2\td1\t1\r\nq2\td2\t1\n")
    assert [document.doc_id for document in source.documents(BadRows())] == ["d1", "d2"]
    assert [document.metadata for document in source.documents(BadRows())] == [{}, {"url": "u"}]
    assert judged(source) == [Example("dos", ("d2", "d1"), "q2", {"site": "s"})]


def test_the_dev_judgements_of_beir_are_the_validation_split(tmp_path):
    source = beir(tmp_path, qrels="q1\td1\t1\n")
    assert source.examples("validation", BadRows(), None) is None
    (tmp_path / "qrels" / "dev.tsv").write_text("q2\td1\t1\n")
    [example] = judged(BeirSource(tmp_path), split="validation")
    assert example.query_id == "q2"


@pytest.mark.parametrize(
    ("qrels", "queries", "said"),
    [
        (HEADER + "q1\td1\t1\nq9\td1\t1\n", None, "train.tsv, line 3: unknown query 'q9'; it is not in queries.jsonl"),
        (HEADER + "q1\td9\t1\nq2\td2\t1\n", None, "train.tsv, line 2: unknown label 'd9'"),
        (HEADER + "q1\td1\nq2\td2\t1\n", None, "train.tsv, line 2: 'q1\\td1' is no judgement"),
        (HEADER + "q1\td1\tyes\nq2\td2\t1\n", None, "train.tsv, line 2: 'q1\\td1\\tyes' is no judgement"),
        ("q1\td1\t1\n", '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}\n', "queries.jsonl, line 2: duplicate"),
        (
            "q1\td1\t1\n",
            '{"_id": "q0", "text": "a"}\n{"_id": "q1", "text": ""}\n',
            "queries.jsonl, line 2: 'text' is empty",
        ),
    ],
)
def test_a_malformed_beir_row_is_refused_with_its_line_or_skipped(tmp_path, qrels, queries, said):
    source = beir(tmp_path, qrels=qrels, queries=queries)
    with pytest.raises(DataError) as caught:
        judged(source)
    assert said in str(caught.value)
    bad = BadRows("skip")
    judged(source, bad=bad)
    assert bad.count == 1


def test_a_beir_folder_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match="no judgements"):
        judged(beir(tmp_path, qrels=HEADER))
    (tmp_path / "qrels" / "train.tsv").unlink()
    with pytest.raises(DataError, match=r"a BEIR folder without qrels/train\.tsv"):
        BeirSource(tmp_path)
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r"a BEIR folder without queries\.jsonl"):
        BeirSource(tmp_path)


# Fuzzing: whatever the bytes, records or a one-line DataError.
LINES = st.sampled_from(
    [
        b"text,label\n",
        b"doc_id,text\n",
        b"a,b\n",
        b'{"text": "a", "label": "b"}\n',
        b'{"doc_id": 1, "text": "\\ud800"}\n',
    ]
)
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(LINES, st.binary(max_size=8)), max_size=8).map(b"".join),
    st.dictionaries(
        st.sampled_from(["text", "label", "doc_id", "metadata", "title", "x", "query_id", "_id"]),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)
            ),
            max_leaves=4,
        ),
    ).map(lambda cells: json.dumps(cells).encode()),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES, suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]), skip=st.booleans())
def test_any_bytes_give_records_or_a_one_line_error(tmp_path, content, suffix, skip):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    bad = BadRows("skip" if skip else "fail")
    source = FileSource("fuzz", {"train": path}, path, Columns())
    records = []
    for read in (
        lambda: records.extend(source.documents(bad) or ()),
        lambda: records.extend(source.examples("train", bad, None) or ()),
    ):
        message = refusal(read)
        assert message is None or len(message.splitlines()) == 1
    assert all(record.text.strip() and record.text.encode() for record in records)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(BYTES, st.sampled_from([b"q1\td1\t1\n", b"q1\td1\tnan\n", b"\t\t\n", b"q1\td1\t1\t1\n"])))
def test_any_bytes_as_beir_judgements_give_records_or_a_one_line_error(tmp_path, content):
    source = beir(tmp_path, qrels="q1\td1\t1\n")
    (tmp_path / "qrels" / "train.tsv").write_bytes(content)
    message = refusal(lambda: judged(source))
    assert message is None or len(message.splitlines()) == 1


NAME = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=12).filter(
    str.strip
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(
        st.builds(
            Example,
            text=NAME,
            doc_ids=st.lists(NAME, min_size=1, max_size=3, unique=True).map(tuple),
            query_id=NAME,
            columns=st.fixed_dictionaries({"site": NAME}),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda example: example.query_id,
    )
)
def test_examples_survive_a_round_trip_through_json_lines(tmp_path, records):
    content = "".join(
        json.dumps({"text": e.text, "label": e.doc_ids, "query_id": e.query_id, **e.columns}) + "\n" for e in records
    )
    assert examples(tmp_path, content, name="round.jsonl") == records
