"""Files and folders that are either whole or absent: written under a temporary name, then renamed."""

import ctypes
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from caravan.errors import CaravanError, StorageError

# safetensors reports a full disk or a missing right as an error of its own, which is no OSError.
_FAILURES = (OSError, SafetensorError)

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux' renameat2(2)


def make_folder(path: str | Path) -> Path:
    """Make a folder and those above it, unless they are there.

    Raises:
        StorageError: it cannot be made (no right, disk full, a file in the way).
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from None
    return Path(path)


def check_writable(folder: str | Path, *, name: str | Path | None = None) -> None:
    """Refuse a folder, there or to be made, in which nothing can be written; nothing is left behind.

    Args:
        folder: where something is to be written later.
        name: what the message calls it; the folder itself if None.

    Raises:
        StorageError: it, or the folder above it in which it would be made, is a file, or gives no right or no space.
    """
    try:
        place = Path(os.path.realpath(folder))
        while not place.exists():
            place = place.parent
        with TemporaryFile(dir=place) as probe:
            probe.write(bytes(4096))  # a full disk may still have room for a name
    except (OSError, ValueError) as error:
        raise _cannot_write(folder if name is None else name, error) from None


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Wait until no other thread or process is inside `alone(path)`, and keep them out; a kill lets the next one in.

    Args:
        path: what is to be changed, a file or a folder; the lock is an empty file beside it, which stays.

    Raises:
        StorageError: the lock cannot be written, or the system has no file locks.
    """
    try:
        import fcntl
    except ImportError:
        raise StorageError(f"{path}: cannot be locked: this system has no fcntl; use Linux or macOS") from None
    target = _target(path)
    try:
        handle = os.open(target.with_name(f".{target.name[:48]}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def hold(path: str | Path) -> int:
    """Open a file to append to, made if it is not there, and hold it until it is closed or the process ends.

    Where another process holds it, or the system has no file locks, it is opened without being held.

    Returns:
        The file's descriptor.

    Raises:
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    with suppress(ImportError):
        import fcntl

        for _ in range(20):  # who only looks, as `is_held` does, lets go at once
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
    return handle


def is_held(path: str | Path) -> bool:
    """Whether somebody holds a file; one that is not there is held by nobody, and without file locks all are free."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path`, on any error it is removed and `path` stays.

    The folder of `path` must be there. Through a symbolic link, the file it points to is replaced.

    Raises:
        StorageError: the place cannot be written (no such folder, no right, disk full), or `path` is no plain file.
    """
    target = _target(path)
    temporary = _beside(target, "tmp")
    try:
        if target.exists() and not target.is_file():
            raise StorageError(f"{path}: is a folder or a device, a file is to be written there; choose another name")
        # Made at once: a place that cannot be written is known before the work, and the file gets the usual rights
        # even if a library replaces it by one of its own.
        temporary.touch(exist_ok=False)
        rights = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        with suppress(OSError):  # not every file system has rights
            temporary.chmod(rights)
        _flush(temporary)
        temporary.replace(target)
    except _FAILURES as error:
        raise _cannot_write(path, error) from None
    finally:
        with suppress(OSError):  # where even this fails, the first error is the one to be told
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files that kills in the middle of `whole_file(path)` left; nobody may be writing it.

    Raises:
        StorageError: one cannot be removed.
    """
    target = _target(path)
    try:
        for left in target.parent.glob(f".{escape(target.name[:48])}.*.tmp"):
            left.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror}; remove it yourself") from None


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of `path`, on any error `path` stays as it was.

    Folders above `path` are made, and removed again on an error. Where system and file system can (Linux on its usual
    disks), old and new change places in one step; elsewhere two renames do it, and a kill in the instant between them
    leaves the old one beside the place, named `.….old`.

    Raises:
        StorageError: the place cannot be written (no right, disk full), or `path` is a file.
    """
    target = _target(path)
    temporary, retired = _beside(target, "tmp"), _beside(target, "old")
    missing: list[Path] = []
    try:
        if target.exists() and not target.is_dir():
            raise StorageError(f"{path}: is a file, a folder is to be written there; choose another name")
        missing = [parent for parent in target.parents if not parent.exists()]
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        if target.exists():
            shutil.copymode(target, temporary)  # what was private stays private
        _swap(temporary, target, retired)
    except _FAILURES as error:
        raise _cannot_write(path, error) from None
    except CaravanError as error:
        # What was written inside names the temporary folder, which the reader of the message will never see.
        raise type(error)(str(error).replace(str(temporary), str(path))) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # where even looking fails, the first error is the one to be told
            if target.exists():
                shutil.rmtree(retired, ignore_errors=True)
            else:
                for parent in missing:
                    parent.rmdir()


def _swap(temporary: Path, target: Path, retired: Path) -> None:
    if _exchange(temporary, target):
        return  # what was there is now the temporary folder, which its maker removes
    try:
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
    except BaseException:  # an interrupt from the keyboard, too
        if retired.exists() and not target.exists():
            retired.rename(target)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step; False where that is not possible, or one of them is not there."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library that is older than the call
        return False
    return rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


def _target(path: str | Path) -> Path:
    """The place to write: behind symbolic links, so that a rename replaces what they point to and not the link."""
    try:
        target = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from None
    if not target.name:
        raise StorageError(f"{path}: is the root of the file system; choose a folder below it")
    return target


def _beside(target: Path, ending: str) -> Path:
    # In the same folder, since a rename does not cross file systems; cut, since names have at most 255 bytes.
    return target.with_name(f".{target.name[:48]}.{secrets.token_hex(4)}.{ending}")


def _flush(file: Path) -> None:
    """Have the disk take the file now: a full disk may show only here, and a power cut must not follow the rename."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _cannot_write(path: str | Path, error: Exception) -> StorageError:
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    return StorageError(f"{path}: cannot be written: {reason}; choose a writable place with free space")
