"""Files that are either whole or absent: written under a temporary name, then renamed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caravan.errors import StorageError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path`, on any error it is removed and `path` stays.

    Raises:
        StorageError: the place cannot be written (no such folder, no right, disk full).
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise _cannot_write(target, error) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of `path`, on any error `path` stays as it was.

    Raises:
        StorageError: the place cannot be written (no right, disk full), or `path` is a file.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    retired = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target}: is a file, a folder is to be written there; choose another name")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rename(retired)
        try:
            temporary.rename(target)
        except OSError:
            if retired.exists():
                retired.rename(target)
            raise
    except OSError as error:
        raise _cannot_write(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(retired, ignore_errors=True)


def _cannot_write(target: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(f"{target}: cannot be written: {reason}; choose a writable place with free space")
