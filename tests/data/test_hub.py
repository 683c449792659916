import sys

import pytest

from caravan.data.dataset import Dataset
from caravan.errors import DataError

datasets = pytest.importorskip("datasets", reason="Hugging Face data sets need the extra `datasets`")


@pytest.fixture(autouse=True)
def _quiet_and_private(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def made(texts, labels, **more):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam_mail"])}
    features |= {name: datasets.Value("string") for name in more}
    return datasets.Dataset.from_dict({"text": texts, "label": labels, **more}, features=datasets.Features(features))


def test_class_labels_become_their_names(tmp_path):
    splits = datasets.DatasetDict(train=made(["a", "b"], [1, 0], site=["n", "s"]), dev=made(["c"], [1]))
    splits.save_to_disk(tmp_path / "mail")
    dataset = Dataset.read(tmp_path / "mail")
    assert dataset.name == "mail"
    assert [(e.text, e.doc_ids, e.columns) for e in dataset.train] == [
        ("a", ("spam_mail",), {"site": "n"}),
        ("b", ("ham",), {"site": "s"}),
    ]
    assert [example.text for example in dataset.validation] == ["c"]
    assert dataset.test == ()
    assert [(document.doc_id, document.text) for document in dataset.catalogue] == [
        ("spam_mail", "spam mail"),
        ("ham", "ham"),
    ]


def test_a_saved_data_set_without_splits_is_train(tmp_path):
    made(["a", "b"], [0, 1]).save_to_disk(tmp_path / "one")
    assert len(Dataset.read(tmp_path / "one", validation_fraction=0.0).train) == 2


def test_a_list_of_class_labels_names_several_documents(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=["x", "y"]))}
    )
    rows = {"text": ["a", "b"], "label": [[1, 0], [1]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "many")
    assert [example.doc_ids for example in Dataset.read(tmp_path / "many").train] == [("y", "x"), ("y",)]


def test_a_folder_of_parquet_files_is_read_with_its_documents_file(tmp_path):
    (tmp_path / "data").mkdir()
    made(["a", "b", "c"], [0, 1, 1]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    made(["d"], [1]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "documents.csv").write_text("doc_id,text\nham,good\nspam_mail,bad\n")
    dataset = Dataset.read(tmp_path)
    assert [document.text for document in dataset.catalogue] == ["good", "bad"]
    assert len(dataset.train) + len(dataset.validation) == 3
    assert dataset.test[0].doc_ids == ("spam_mail",)


def test_a_row_without_label_is_refused_with_its_number_or_skipped(tmp_path):
    made(["a", "b", "c"], [0, -1, 1]).save_to_disk(tmp_path / "gap")
    with pytest.raises(DataError, match=r"gap \[train\], line 2: 'label' is empty"):
        Dataset.read(tmp_path / "gap")
    assert Dataset.read(tmp_path / "gap", on_bad_row="skip").skipped == 1


def test_a_large_split_is_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mapped"))
    made(["a", "b"], [0, 1]).save_to_disk(tmp_path / "large")
    dataset = Dataset.read(tmp_path / "large", mapped_above_bytes=1, validation_fraction=0.0)
    assert not isinstance(dataset.train, tuple)
    assert [example.text for example in dataset.train] == ["a", "b"]


def test_missing_columns_and_splits_are_named_with_those_found(tmp_path):
    made(["a"], [0]).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match=r"one \[train\]: no column 'intent'; found 'text', 'label'"):
        Dataset.read(tmp_path / "one", label_column="intent")
    with pytest.raises(DataError, match="no split 'holdout'; found 'train'"):
        Dataset.read(tmp_path / "one", test="holdout")
    datasets.DatasetDict(test=made(["a"], [0])).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="no split 'train'; found 'test'"):
        Dataset.read(tmp_path / "two")


def test_a_damaged_folder_is_refused_in_one_line(tmp_path):
    made(["a"], [0]).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="not readable as a Hugging Face data set") as caught:
        Dataset.read(tmp_path / "one")
    assert "\n" not in str(caught.value)


class NoSuchDataError(FileNotFoundError):
    """Stands in for the library's own DatasetNotFoundError."""


NoSuchDataError.__name__ = "DatasetNotFoundError"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ConnectionError("Couldn't reach 'org/name' on the Hub\nmore"),
            r"hub cannot be reached \(Couldn't reach 'org/name' on the Hub\)",
        ),
        (NoSuchDataError("gone"), "no such data set on the Hugging Face hub; check the id"),
        (ValueError("Config name is missing.\nPick one"), r"Config name is missing\.; name one of its configurations"),
        (RuntimeError(), "cannot be loaded: RuntimeError"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(monkeypatch, error, said):
    def refuse(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=said) as caught:
        Dataset.read("org/name")
    assert "\n" not in str(caught.value)


def test_an_id_can_name_a_configuration(monkeypatch):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict(train=made(["a", "b"], [0, 1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert Dataset.read("org/name:small").name == "org/name:small"
    Dataset.read("org/name")
    assert asked == [("org/name", "small"), ("org/name", None)]


def test_without_the_library_the_message_names_the_extra(tmp_path, monkeypatch):
    made(["a"], [0]).save_to_disk(tmp_path / "one")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in ("org/name", tmp_path / "one"):
        with pytest.raises(DataError, match=r"install caravan\[datasets\]"):
            Dataset.read(path)
