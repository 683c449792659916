"""The data set: a catalogue with train, validation and test examples, from whatever a path names."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from caravan.config import DataConfig, config_from_dict
from caravan.data.catalogue import Catalogue
from caravan.data.formats import SPLITS, BeirSource, Columns, FileSource, Source, find_table
from caravan.data.hub import HubSource
from caravan.data.mapped import MappedExamples
from caravan.data.records import Document, Example
from caravan.data.splits import cut_validation
from caravan.data.tables import SUFFIXES, BadRows, fault, shown, table_suffix

MAPPED_ABOVE_BYTES = 256 * 2**20  # as Python objects, a query file takes three to five times its size in memory
_HELPDESK = Path(__file__).parent / "helpdesk"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Dataset:
    """A catalogue and the examples that are answered by its documents.

    Attributes:
        name: the folder's or file's name, or the id.
        catalogue: C documents.
        train: at least one example.
        validation: may be empty.
        test: may be empty.
        skipped: malformed rows left out (only with `on_bad_row="skip"`).
    """

    name: str
    catalogue: Catalogue
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    skipped: int = 0

    @classmethod
    def read(
        cls,
        path: str | Path = "helpdesk",
        *,
        documents: str | Path | None = None,
        validation: str | Path | None = None,
        test: str | Path | None = None,
        text_column: str = "text",
        label_column: str = "label",
        label_separator: str | None = None,
        on_bad_row: Literal["fail", "skip"] = "fail",
        validation_fraction: float = 0.1,
        seed: int = 13,
        mapped_above_bytes: int = MAPPED_ABOVE_BYTES,
    ) -> "Dataset":
        """Read a data set.

        Files are streamed, never held whole. Examples are kept as Python objects, but those of a split whose text is
        larger than `mapped_above_bytes` (estimated from the file's size) in a memory-mapped Arrow file, which needs
        the extra `datasets`; either way they are a sequence of `Example`.

        Args:
            path: one of
                "helpdesk", the bundled corpus;
                a CSV, TSV or JSON Lines file (also .gz) of training queries;
                a folder with `train.*` and perhaps `validation.*`, `test.*` and `documents.*`;
                a BEIR folder (`corpus.jsonl`, `queries.jsonl`, `qrels/`);
                a folder of `datasets`' save_to_disk, or of Parquet files;
                the id of a Hugging Face data set, `owner/name` or `owner/name:configuration`.
            documents: a file `doc_id,text[,title,metadata]`; None: `documents.*` beside the queries, else one
                document per label of train, its text the label with spaces for underscores.
            validation: a query file (of a Hugging Face data set: a split); None: `validation.*` beside `train.*`,
                else cut from train.
            test: likewise; None: `test.*` beside `train.*`, else there is none.
            text_column: the column of the query.
            label_column: the column of its document id, or of a list of them (JSON Lines).
            label_separator: what stands between ids where one cell names several; None: one id a cell.
            on_bad_row: "fail" at the first malformed row, or "skip" and count.
            validation_fraction: of train, in [0, 1), when it is cut from there (`splits.cut_validation`).
            seed: of that cut.
            mapped_above_bytes: size of a split's text in bytes above which its examples stay on disk.

        Raises:
            ConfigError: an argument is out of range.
            DataError: something is missing, cannot be read, or is malformed; the message names file and line.
            StorageError: a memory-mapped copy cannot be written.
        """
        files = {"documents": documents, "validation": validation, "test": test}
        settings = {
            "path": str(path),
            **{name: None if file is None else str(file) for name, file in files.items()},
            "text_column": text_column,
            "label_column": label_column,
            "label_separator": label_separator,
            "on_bad_row": on_bad_row,
            "validation_fraction": validation_fraction,
        }
        config = config_from_dict({"data": settings, "seed": seed}, source="Dataset.read")
        return _read(config.data, seed=seed, mapped_above_bytes=mapped_above_bytes)

    @classmethod
    def from_config(cls, config: DataConfig, *, seed: int) -> "Dataset":
        """Read the data set that the settings name; see `read`."""
        return _read(config, seed=seed, mapped_above_bytes=MAPPED_ABOVE_BYTES)


def open_source(config: DataConfig) -> Source:
    """Find out what `config.path` names.

    Raises:
        DataError: nothing that can be read.
    """
    columns = Columns(config.text_column, config.label_column, config.label_separator)
    documents = Path(config.documents) if config.documents else None
    path = _HELPDESK if config.path == "helpdesk" else Path(config.path)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a NUL in the name, or a name that is too long
        raise fault(shown(config.path), None, f"not a usable path: {error}; check it") from None
    if is_folder:
        return _open_folder(path, config, columns, documents)
    if not is_there and _HUB_ID.fullmatch(config.path) and not table_suffix(path) and not path.parent.is_dir():
        asked = {"validation": config.validation, "test": config.test}
        splits = {split: name for split, name in asked.items() if name}
        return HubSource(config.path, columns, documents=documents, splits=splits)
    if not is_there:
        remedy = 'give a file, a folder, "helpdesk", or the id of a Hugging Face data set'
        raise fault(path, None, f"no such file or folder; {remedy}")
    stem = path.name.split(".")[0]
    return FileSource(stem, _split_files(path, config), documents or find_table(path.parent, "documents"), columns)


def _open_folder(folder: Path, config: DataConfig, columns: Columns, documents: Path | None) -> Source:
    if any((folder / name).exists() for name in ("corpus.jsonl", "corpus.jsonl.gz", "qrels")):
        if documents or config.validation or config.test:
            what = "a BEIR folder brings its own documents and splits"
            raise fault(folder, None, f"{what}; leave documents, validation and test unset")
        return BeirSource(folder)
    train = find_table(folder, "train")
    documents = documents or find_table(folder, "documents")
    if train:
        return FileSource(folder.resolve().name, _split_files(train, config), documents, columns)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    if saved or next(folder.rglob("*.parquet"), None):
        asked = {"validation": config.validation, "test": config.test}
        splits = {split: name for split, name in asked.items() if name}
        return HubSource(str(folder), columns, documents=documents, splits=splits)
    names = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
    raise fault(folder, None, f"a folder without training queries; put {names} (or one of them as .gz) there")


def _split_files(train: Path, config: DataConfig) -> dict[str, Path]:
    """The query files by split; `validation.*` and `test.*` lie beside a file that is itself named `train.*`."""
    files = {"train": train}
    for split, given in (("validation", config.validation), ("test", config.test)):
        beside = find_table(train.parent, split) if train.name.split(".")[0] == "train" else None
        path = Path(given) if given else beside
        if path:
            files[split] = path
    return files


def _read(config: DataConfig, *, seed: int, mapped_above_bytes: int) -> Dataset:
    source = open_source(config)
    bad = BadRows(config.on_bad_row)
    stream = source.documents(bad)
    documents = None if stream is None else tuple(stream)
    if documents is not None:
        _check_some(documents, "document", source, bad)
    # With no documents file, the labels of train become the catalogue, and the other splits are held to them.
    labels: dict[str, None] = {document.doc_id: None for document in documents or ()}
    splits: dict[str, Sequence[Example]] = {}
    for split in SPLITS:
        from_labels = documents is None and split == "train"
        examples = source.examples(split, bad, None if from_labels else labels)
        if examples is None:
            continue
        if from_labels:
            examples = _noting_labels(examples, labels)
        if source.size_bytes(split) > mapped_above_bytes:
            splits[split] = MappedExamples.write(examples)
        else:
            splits[split] = tuple(examples)
        _check_some(splits[split], f"{split} query", source, bad)
    if documents is None:
        documents = tuple(Document(label, label.replace("_", " ").strip() or label) for label in labels)
    train = splits["train"]
    validation = splits.get("validation")
    if validation is None:
        train, validation = cut_validation(train, config.validation_fraction, seed=seed)
    return Dataset(
        name="helpdesk" if config.path == "helpdesk" else source.name,
        catalogue=Catalogue(documents),
        train=train,
        validation=validation,
        test=splits.get("test", ()),
        skipped=bad.count,
    )


def _noting_labels(examples: Iterable[Example], labels: dict[str, None]) -> Iterator[Example]:
    for example in examples:
        labels.update(dict.fromkeys(example.doc_ids))
        yield example


def _check_some(records: Sequence[object], what: str, source: Source, bad: BadRows) -> None:
    if not records:
        raise fault(source.name, None, f"not one usable {what} ({bad.count} rows skipped; the first: {bad.first})")
