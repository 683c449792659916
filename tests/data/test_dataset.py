import gzip
import os
from pathlib import Path

import pytest

from caravan.config import DataConfig
from caravan.data.dataset import Dataset
from caravan.data.formats import SPLITS
from caravan.errors import ConfigError, DataError

TRAIN = b"text,label\na,x\nb,y\nc,x\nd,y\n"
DOCUMENTS = b"doc_id,text\nx,ex\ny,why\nz,zed\n"
SHARED = Path(os.environ.get("CARAVAN_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_is_read_with_all_its_files(tmp_path):
    files = {
        "train.tsv": b"text\tlabel\na\tx\nb\ty\n",
        "validation.jsonl": b'{"text": "c", "label": ["z", "x"]}\n',
        "test.csv.gz": gzip.compress(b"text,label,site\nd,y,north\n"),
        "documents.csv": DOCUMENTS,
        "notes.txt": b"not data",
    }
    dataset = Dataset.read(folder_of(tmp_path / "mine", files))
    assert dataset.name == "mine"
    assert dataset.catalogue.ids == ("x", "y", "z")
    assert [example.text for example in dataset.train] == ["a", "b"]
    assert [example.doc_ids for example in dataset.validation] == [("z", "x")]
    assert dataset.test[0].columns == {"site": "north"}
    assert dataset.skipped == 0


def test_without_documents_each_label_of_train_is_one(tmp_path):
    path = folder_of(tmp_path, {"queries.csv": b"text,label\na,lost_card\nb,__\nc,lost_card\n"}) / "queries.csv"
    dataset = Dataset.read(path)
    assert dataset.name == "queries"
    assert [(document.doc_id, document.text) for document in dataset.catalogue] == [
        ("lost_card", "lost card"),
        ("__", "__"),
    ]


def test_validation_and_test_lie_beside_train_only_and_documents_beside_any_file(tmp_path):
    files = {
        "train.csv": TRAIN,
        "other.csv": TRAIN,
        "test.csv": TRAIN,
        "validation.csv": TRAIN,
        "documents.csv": DOCUMENTS,
    }
    folder_of(tmp_path, files)
    train, other = Dataset.read(tmp_path / "train.csv"), Dataset.read(tmp_path / "other.csv", validation_fraction=0.0)
    assert [len(split) for split in (train.train, train.validation, train.test)] == [4, 4, 4]
    assert [len(split) for split in (other.train, other.validation, other.test)] == [4, 0, 0]
    assert len(train.catalogue) == len(other.catalogue) == 3


def test_files_given_by_name_come_before_those_found(tmp_path):
    files = {
        "train.csv": TRAIN,
        "test.csv": TRAIN,
        "validation.csv": TRAIN,
        "documents.csv": DOCUMENTS,
        "elsewhere/d.csv": DOCUMENTS + b"w,double\n",
        "elsewhere/v.csv": b"text,label\nv,w\n",
        "elsewhere/t.csv": b"text,label\nt,w\n",
    }
    folder = folder_of(tmp_path, files)
    other = folder / "elsewhere"
    dataset = Dataset.read(folder, documents=other / "d.csv", validation=str(other / "v.csv"), test=other / "t.csv")
    assert len(dataset.catalogue) == 4
    assert [example.text for example in (*dataset.validation, *dataset.test)] == ["v", "t"]


def test_a_beir_folder_is_read_with_its_three_splits(tmp_path):
    files = {
        "corpus.jsonl": b'{"_id": "x", "title": "T", "text": "one"}\n{"_id": "y", "title": "", "text": "two"}\n',
        "queries.jsonl.gz": gzip.compress(b"".join(b'{"_id": "q%d", "text": "query %d"}\n' % (n, n) for n in range(4))),
        "qrels/train.tsv": b"query-id\tcorpus-id\tscore\nq0\tx\t1\nq0\ty\t2\nq1\ty\t1\n",
        "qrels/dev.tsv": b"q2\ty\t1\n",
        "qrels/test.tsv": b"q3\tx\t1\n",
    }
    dataset = Dataset.read(folder_of(tmp_path, files))
    assert dataset.catalogue.document(0).title == "T"
    found = [[(e.query_id, e.doc_ids) for e in part] for part in (dataset.train, dataset.validation, dataset.test)]
    assert found == [[("q0", ("x", "y")), ("q1", ("y",))], [("q2", ("y",))], [("q3", ("x",))]]
    with pytest.raises(DataError, match="brings its own documents and splits"):
        Dataset.read(tmp_path, test=tmp_path / "qrels" / "test.tsv")


def test_settings_and_arguments_read_the_same(tmp_path):
    folder_of(tmp_path, {"train.csv": b"q,l\n" + b"".join(b"%d,x|y\n" % n for n in range(20))})
    config = DataConfig(
        path=str(tmp_path), text_column="q", label_column="l", label_separator="|", validation_fraction=0.5
    )
    from_config = Dataset.from_config(config, seed=3)
    read = Dataset.read(
        tmp_path, text_column="q", label_column="l", label_separator="|", validation_fraction=0.5, seed=3
    )
    assert (read.train, read.validation) == (from_config.train, from_config.validation)
    assert len(read.train) == len(read.validation) == 10
    assert read.catalogue.ids == ("x", "y")


def test_bad_rows_are_counted_over_all_files_when_skipped(tmp_path):
    files = {
        "train.csv": TRAIN + b",x\ne\nf,gone\n",
        "test.csv": b"text,label\na,x\nb,unknown\n",
        "documents.csv": DOCUMENTS + b"x,again\n",
    }
    folder = folder_of(tmp_path, files)
    dataset = Dataset.read(folder, on_bad_row="skip", validation_fraction=0.0)
    assert dataset.skipped == 5
    assert (len(dataset.catalogue), len(dataset.train), len(dataset.test)) == (3, 4, 1)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "a folder without training queries; put train.csv, train.tsv, train.jsonl"),
        ({"test.csv": TRAIN}, "a folder without training queries"),
        ({"train.csv": b""}, "train.csv: an empty file"),
        ({"train.csv": b"text,label\n"}, "train.csv: a header line but no rows"),
        ({"train.csv": b"query,label\na,b\n"}, "train.csv, line 1: no column 'text'; found 'query', 'label'"),
        ({"train.csv": TRAIN, "train.tsv": TRAIN}, "'train.csv', 'train.tsv' are both there"),
        ({"train.csv": TRAIN, "train.csv.gz": TRAIN}, "are both there; keep one"),
        ({"train.csv/x": b""}, "train.csv: a folder where a file is expected"),
        ({"train.csv": TRAIN, "test.csv": b"text,label\na,w\n"}, "test.csv, line 2: unknown label 'w'"),
        ({"train.csv": TRAIN, "validation.csv": b"text,label\na,w\n"}, "validation.csv, line 2: unknown label 'w'"),
        ({"train.csv": TRAIN, "documents.csv": b"doc_id,text\nx,ex\n"}, "train.csv, line 3: unknown label 'y'"),
        ({"train.csv": TRAIN, "documents.csv": b"id,text\nx,ex\n"}, "documents.csv, line 1: no column 'doc_id'"),
        (
            {"train.csv": TRAIN, "documents.csv": DOCUMENTS + b"x,ex\n"},
            "documents.csv, line 5: duplicate document id 'x'",
        ),
        ({"train.csv": TRAIN, "documents.csv": b"doc_id,text\nx,\n"}, "documents.csv, line 2: 'text' is empty"),
        ({"train.csv": TRAIN, "documents.jsonl": b"\x00\x01\xff"}, "documents.jsonl, line 1: not JSON"),
        ({"qrels/test.tsv": b"a\tb\t1\n"}, "a BEIR folder without corpus.jsonl"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(tmp_path, files, said):
    with pytest.raises(DataError) as caught:
        Dataset.read(folder_of(tmp_path, files))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train.csv": b"text,label\n,x\n"}, "not one usable train query (1 rows skipped; the first: "),
        ({"train.csv": TRAIN, "documents.csv": b"doc_id,text\n,x\n"}, "not one usable document (1 rows skipped"),
        ({"train.csv": TRAIN, "test.csv": b"text,label\na,w\n"}, "not one usable test query"),
    ],
)
def test_a_file_of_bad_rows_only_is_refused_even_when_they_are_skipped(tmp_path, files, said):
    with pytest.raises(DataError) as caught:
        Dataset.read(folder_of(tmp_path, files), on_bad_row="skip")
    assert said in str(caught.value)


@pytest.mark.parametrize("path", ["gone.csv", "gone/train.csv", "./gone", "gone", "a\0b", "x" * 5000])
def test_a_path_that_leads_nowhere_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder|not a usable path"):
        Dataset.read(path)


def test_a_missing_folder_in_an_existing_one_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(folder_of(tmp_path, {"data/here.csv": TRAIN}))
    with pytest.raises(DataError, match="data/gone: no such file or folder; give"):
        Dataset.read("data/gone")


def test_named_files_that_are_missing_are_refused(tmp_path):
    folder_of(tmp_path, {"train.csv": TRAIN})
    for name in ("documents", "validation", "test"):
        with pytest.raises(DataError, match=r"gone\.csv: no such file"):
            Dataset.read(tmp_path, **{name: tmp_path / "gone.csv"})


@pytest.mark.parametrize(
    ("argument", "value"),
    [("validation_fraction", 1.0), ("validation_fraction", -0.1), ("on_bad_row", "warn"), ("seed", -1)],
)
def test_an_argument_out_of_range_is_a_config_error(tmp_path, argument, value):
    with pytest.raises(ConfigError, match=argument):
        Dataset.read(folder_of(tmp_path, {"train.csv": TRAIN}), **{argument: value})


def test_the_bundled_corpus_is_read_by_its_name_and_by_default():
    dataset = Dataset.read()
    assert dataset.name == "helpdesk"
    assert len(dataset.catalogue) >= 80
    assert {doc_id for example in dataset.train for doc_id in example.doc_ids} == set(dataset.catalogue.ids)
    assert dataset.test
    assert all(example.columns["site"] for example in dataset.train)
    assert all(document.title and document.metadata["topic"] for document in dataset.catalogue)


# Documents, train + validation, test: as each folder's SOURCE.md says.
COUNTS = {
    "ag_news": (4, 48_325, 7_600),
    "banking77": (77, 10_003, 3_080),
    "pricerunner_offers": (13_233, 29_832, 5_479),
    "sms_spam": (2, 4_472, 1_102),
    "stackfaq": (125, 874, 375),
    "wikitablequestions": (2_108, 14_152, 3_523),
    "arxiv": (172, 46_944, 11_736),
    "flickr30k_captions": (31_014, 93_005, 31_014),
}
SLOW = {"arxiv", "flickr30k_captions"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COUNTS])
def test_a_shared_data_set_has_the_counts_its_source_page_gives(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not here; set CARAVAN_DATA to the folder of the data sets")
    dataset = Dataset.read(SHARED / name)
    assert (len(dataset.catalogue), len(dataset.train) + len(dataset.validation), len(dataset.test)) == COUNTS[name]
    assert 0.07 < len(dataset.validation) / COUNTS[name][1] < 0.11
    assert not {example.text for example in dataset.train} & {example.text for example in dataset.validation}
    for split in SPLITS:
        examples = getattr(dataset, split)
        assert len({example.query_id for example in examples}) == len(examples)


def test_the_extra_columns_of_the_shared_data_sets_are_kept():
    if not (SHARED / "stackfaq").is_dir() or not (SHARED / "pricerunner_offers").is_dir():
        pytest.skip(f"{SHARED} is not here; set CARAVAN_DATA to the folder of the data sets")
    faq, offers = Dataset.read(SHARED / "stackfaq"), Dataset.read(SHARED / "pricerunner_offers")
    assert all(document.metadata["answer"] for document in faq.catalogue)
    assert len({example.columns["client"] for example in (*offers.train, *offers.validation, *offers.test)}) == 306
