"""Hugging Face data sets: an id of the hub, a folder of `save_to_disk`, or a folder of Parquet files."""

import importlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from caravan.data.formats import SPLITS, Columns, examples_from_rows, read_documents
from caravan.data.records import Document, Example
from caravan.data.tables import BadRows, Row, fault, listed
from caravan.errors import DataError

_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


class HubSource:
    """The splits of a Hugging Face data set, memory-mapped by the `datasets` library.

    Integer labels of a ClassLabel feature become their names; other text, number and truth columns become columns of
    the examples, and everything else (images, sound, nested values) is left unread.
    """

    def __init__(
        self,
        path: str,
        columns: Columns,
        *,
        documents: Path | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        """Open a data set.

        Args:
            path: a local folder, or `owner/name` on the hub; `owner/name:configuration` where it has several.
            columns: which columns to use.
            documents: a documents file; None: labels only.
            splits: the data set's own name of a split, by ours ("validation", "test"), where they differ.

        Raises:
            DataError: `datasets` is missing, the hub cannot be reached, or the data set, its train split or a column
                is not there.
        """
        self.name = Path(path).resolve().name if Path(path).is_dir() else path
        self._path = path
        self._columns = columns
        self._documents = documents
        found = _load(path)
        self._splits = {split: found[name] for split, name in _split_names(path, found, splits or {}).items()}
        for split, data in self._splits.items():
            missing = [name for name in (columns.text, columns.label) if name not in data.column_names]
            if missing:
                what = f"no column {listed(missing)}; found {listed(data.column_names)}"
                raise fault(f"{path} [{split}]", None, f"{what}; say which to use (text_column, label_column)")

    def documents(self, bad: BadRows) -> Iterator[Document] | None:
        """See `Source.documents`."""
        return read_documents(self._documents, bad) if self._documents else None

    def examples(self, split: str, bad: BadRows, known: Container[str] | None) -> Iterator[Example] | None:
        """See `Source.examples`."""
        data = self._splits.get(split)
        if data is None:
            return None
        rows = _rows(data, self._columns, f"{self._path} [{split}]")
        return examples_from_rows(rows, self._columns, bad, split=split, known=known)

    def size_bytes(self, split: str) -> int:
        """See `Source.size_bytes`."""
        return int(self._splits[split].data.nbytes)


def _load(path: str) -> dict[str, Any]:
    """The data set's splits by their own names; a data set without splits is its train split."""
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError:
        what = "no such file or folder here, and Hugging Face data sets need the `datasets` library"
        if Path(path).is_dir():
            what = "a Hugging Face data set, which needs the `datasets` library"
        raise fault(path, None, f"{what}; install caravan[datasets]") from None
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = library.load_from_disk(path)
        elif folder.is_dir():
            loaded = library.load_dataset(path)
        else:
            name, _, configuration = path.partition(":")
            loaded = library.load_dataset(name, configuration or None)
    except Exception as error:  # the library raises nearly anything, and a user must see one line
        raise _loading_fault(path, error) from None
    return dict(loaded) if isinstance(loaded, library.DatasetDict) else {"train": loaded}


def _loading_fault(path: str, error: Exception) -> DataError:
    got = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(path).is_dir():
        return fault(path, None, f"not readable as a Hugging Face data set: {got}; write it again with save_to_disk")
    if "NotFound" in type(error).__name__:
        remedy = "check the id; a private one needs `hf auth login`"
        return fault(path, None, f"no such file or folder here, and no such data set on the Hugging Face hub; {remedy}")
    if isinstance(error, OSError):
        what = f"no such file or folder here, and the Hugging Face hub cannot be reached ({got})"
        return fault(path, None, f"{what}; check the path or the network")
    remedy = "name one of its configurations as owner/name:configuration, or another data set"
    return fault(path, None, f"the data set cannot be loaded: {got}; {remedy}")


def _split_names(path: str, found: Mapping[str, Any], asked: Mapping[str, str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for split in SPLITS:
        name = asked.get(split) or next((alias for alias in _ALIASES[split] if alias in found), None)
        if name is None and split != "train":
            continue
        if name is None or name not in found:
            raise fault(path, None, f"no split {name or split!r}; found {listed(list(found))}; name a data set with it")
        names[split] = name
    return names


def _rows(data: Any, columns: Columns, source: str) -> Iterator[Row]:
    plain = [name for name, feature in data.features.items() if _is_plain(feature)]
    used = dict.fromkeys((columns.text, columns.label, *plain))
    class_names = {name: names for name in used if (names := _class_names(data.features[name]))}
    for number, cells in enumerate(data.select_columns(list(used)), start=1):
        yield Row(source, number, {name: _named(value, class_names.get(name)) for name, value in cells.items()})


def _is_plain(feature: Any) -> bool:
    kind = getattr(feature, "dtype", "")
    return isinstance(kind, str) and kind.startswith(("string", "large_string", "int", "uint", "float", "bool"))


def _class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them; None for any other feature."""
    names: list[str] | None = getattr(getattr(feature, "feature", feature), "names", None)
    return names


def _named(value: object, names: list[str] | None) -> object:
    if isinstance(value, list):
        return [_named(part, names) for part in cast("list[object]", value)]
    if names is None or not isinstance(value, int):
        return value
    # -1 is the library's mark for "no label": an empty cell, which the row's check names.
    return names[value] if 0 <= value < len(names) else ""
