import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caravan.data.catalogue import Catalogue
from caravan.data.records import Document, Example
from caravan.errors import DataError, StorageError

THREE = (Document("b", "beta"), Document("a", "alpha", "A", {"url": "u"}), Document("c", "\u03b3"))


def test_rows_follow_the_order_of_the_documents():
    catalogue = Catalogue(iter(THREE))
    assert catalogue.ids == ("b", "a", "c")
    assert tuple(catalogue) == catalogue.documents == THREE
    assert [catalogue.row(doc_id) for doc_id in "abc"] == [1, 0, 2]
    assert catalogue.document(1) is THREE[1]
    assert catalogue.gold_rows(Example("q", ("c", "b"))) == [2, 0]
    assert len(catalogue) == 3


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([], "needs at least one document"),
        ([Document("a", "x"), Document("", "y")], "document 2 of the catalogue has an empty id"),
        ([Document("a", "x"), Document("b", "y"), Document("a", "z")], "duplicate document id 'a'"),
    ],
)
def test_a_catalogue_refuses_no_documents_empty_ids_and_duplicates(documents, said):
    with pytest.raises(DataError, match=said):
        Catalogue(documents)


def test_unknown_ids_and_rows_are_data_errors():
    catalogue = Catalogue(THREE)
    with pytest.raises(DataError, match="no document 'z' among the 3"):
        catalogue.gold_rows(Example("q", ("a", "z")))
    for row in (-1, 3):
        with pytest.raises(DataError, match=f"no row {row} in the catalogue; rows are 0 to 2"):
            catalogue.document(row)


def test_the_fingerprint_is_the_hash_of_ids_titles_and_texts_in_order():
    expected = hashlib.sha256(b'["b", "", "beta"]\n["a", "A", "alpha"]\n["c", "", "\\u03b3"]\n').hexdigest()
    assert Catalogue(THREE).fingerprint == expected
    assert Catalogue(reversed(THREE)).fingerprint != expected
    assert Catalogue([Document("a", "x", "yz")]).fingerprint != Catalogue([Document("a", "xy", "z")]).fingerprint


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=12)
DOCUMENTS = st.lists(
    st.builds(
        Document,
        TEXT.filter(str.strip),
        TEXT.filter(str.strip),
        st.one_of(st.just(""), TEXT),
        st.dictionaries(TEXT, TEXT, max_size=2),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda document: document.doc_id,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS)
def test_what_is_written_is_read_back_equal(tmp_path, documents):
    path = tmp_path / "documents.jsonl"
    catalogue = Catalogue(documents)
    catalogue.write(path)
    again = Catalogue.read(path)
    assert again.documents == catalogue.documents
    assert again.fingerprint == catalogue.fingerprint
    assert len(path.read_bytes().splitlines()) == len(documents)
    assert [file.name for file in tmp_path.iterdir()] == ["documents.jsonl"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "documents.jsonl"
    Catalogue(THREE).write(path)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match=r"documents\.jsonl: cannot be written: No space left on device"):
        Catalogue(THREE[:1]).write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["documents.jsonl"]
    assert path.read_bytes() == before


def test_a_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be written: No such file or directory"):
        Catalogue(THREE).write(tmp_path / "gone" / "documents.jsonl")
