import pickle
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caravan.data import mapped
from caravan.data.dataset import Dataset
from caravan.data.mapped import MappedExamples
from caravan.data.records import Example
from caravan.errors import DataError, StorageError

pytest.importorskip("pyarrow", reason="memory-mapped examples need pyarrow (extra `datasets`)")

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=10)
EXAMPLES = st.lists(
    st.builds(Example, TEXT, st.lists(TEXT, min_size=1).map(tuple), TEXT, st.dictionaries(TEXT, TEXT, max_size=2)),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(examples=EXAMPLES)
def test_mapped_examples_equal_the_list_they_come_from(tmp_path, monkeypatch, examples):
    monkeypatch.setattr(mapped, "_BATCH", 5)
    view = MappedExamples.write(iter(examples), folder=tmp_path)
    assert len(view) == len(examples)
    assert list(view) == examples
    assert [view[index] for index in range(-len(examples), len(examples))] == [*examples, *examples]
    assert list(view[1:9:2]) == examples[1:9:2]
    assert list(view[::-1]) == examples[::-1]
    assert list(pickle.loads(pickle.dumps(view))) == examples
    with pytest.raises(IndexError):
        view[len(examples)]
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_row_leaves_no_file_behind(tmp_path):
    def stream():
        yield Example("a", ("x",))
        raise DataError("line 2 is broken")

    with pytest.raises(DataError, match="line 2 is broken"):
        MappedExamples.write(stream(), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot keep a copy of the queries there"):
        MappedExamples.write([], folder=tmp_path / "file" / "folder")


def test_without_pyarrow_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StorageError, match=r"install caravan\[datasets\]"):
        MappedExamples.write([], folder=tmp_path)


def test_a_split_above_the_threshold_reads_the_same_as_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = "".join(f"question {number},label_{number % 3},{number % 2}\n" for number in range(60))
    (tmp_path / "train.csv").write_text("text,label,site\n" + rows)
    (tmp_path / "test.csv").write_text("text,label\nq,label_1\n")
    plain = Dataset.read(tmp_path)
    on_disk = Dataset.read(tmp_path, mapped_above_bytes=100)
    assert isinstance(plain.train, tuple)
    assert not isinstance(on_disk.train, tuple)
    assert isinstance(on_disk.test, tuple)
    assert tuple(on_disk.train) == plain.train
    assert tuple(on_disk.validation) == plain.validation
    assert on_disk.catalogue.documents == plain.catalogue.documents
