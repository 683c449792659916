"""Examples kept in a memory-mapped Arrow file, for query files larger than memory should hold."""

import contextlib
import importlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import platformdirs

from caravan.data.records import Example
from caravan.data.splits import select
from caravan.errors import StorageError

_BATCH = 4096  # examples an Arrow batch: what is decoded at once when walking through


class MappedExamples(Sequence[Example]):
    """A read-only sequence of examples that lie on disk; only those looked at become Python objects.

    The file is written to the user's cache folder and, where the system allows it, unlinked as soon as it is mapped:
    nothing stays behind when the process ends, however it ends.
    """

    def __init__(self, batches: Sequence[Any], length: int) -> None:
        self._batches = batches  # pyarrow.RecordBatch, each of _BATCH rows but for the last
        self._length = length

    @classmethod
    def write(cls, examples: Iterable[Example], *, folder: Path | None = None) -> "MappedExamples":
        """Write a stream of examples to disk, `_BATCH` at a time, and map the file.

        Args:
            examples: any number, taken once.
            folder: where the file goes; None: the user's cache folder (not the temporary folder, which is memory on
                many systems).

        Raises:
            StorageError: pyarrow is missing, or the file cannot be written.
        """
        try:
            arrow: Any = importlib.import_module("pyarrow")
        except ImportError:
            remedy = "install caravan[datasets], or split the query file"
            raise StorageError(
                f"a query file too large for memory needs pyarrow, which is not here; {remedy}"
            ) from None
        folder = folder or platformdirs.user_cache_path("caravan")
        stream = iter(examples)
        path: Path | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix="examples-", suffix=".arrow", delete=False) as file:
                path = Path(file.name)
                length = _write_batches(arrow, file, stream)
            opened = arrow.ipc.open_file(arrow.memory_map(str(path)))
            batches = [opened.get_batch(number) for number in range(opened.num_record_batches)]
        except OSError as error:
            what = f"cannot keep a copy of the queries there: {error.strerror or error}"
            raise StorageError(f"{folder}: {what}; free space, or set XDG_CACHE_HOME to another disk") from None
        finally:
            if path is not None:
                with contextlib.suppress(OSError):  # a system that keeps mapped files from being unlinked
                    path.unlink()
        return cls(batches, length)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return select(self, range(*index.indices(self._length)))
        batch, row = divmod(range(self._length)[index], _BATCH)
        return _examples(self._batches[batch].slice(row, 1))[0]

    def __iter__(self) -> Iterator[Example]:
        for batch in self._batches:
            yield from _examples(batch)


def _write_batches(arrow: Any, file: Any, stream: Iterator[Example]) -> int:
    schema = arrow.schema(
        [
            ("text", arrow.string()),
            ("doc_ids", arrow.list_(arrow.string())),
            ("query_id", arrow.string()),
            ("columns", arrow.map_(arrow.string(), arrow.string())),
        ]
    )
    length = 0
    with arrow.ipc.new_file(file, schema) as writer:
        while chunk := list(islice(stream, _BATCH)):
            values = [
                [example.text for example in chunk],
                [list(example.doc_ids) for example in chunk],
                [example.query_id for example in chunk],
                [list(example.columns.items()) for example in chunk],
            ]
            arrays = [arrow.array(column, field.type) for column, field in zip(values, schema, strict=True)]
            writer.write_batch(arrow.record_batch(arrays, schema=schema))
            length += len(chunk)
    return length


def _examples(batch: Any) -> list[Example]:
    columns = [batch.column(name).to_pylist() for name in ("text", "doc_ids", "query_id", "columns")]
    return [
        Example(text, tuple(doc_ids), query_id, dict(pairs))
        for text, doc_ids, query_id, pairs in zip(*columns, strict=True)
    ]
