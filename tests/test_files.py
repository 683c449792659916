import errno
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from caravan import files
from caravan.errors import DataError, StorageError
from caravan.files import hold, is_held, make_folder, whole_file, whole_folder
from disks import make_read_only, small_disk

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
WRITERS = [whole_file, whole_folder]


def contents(folder: Path) -> dict[str, str]:
    """All files below a folder by relative name, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def put(writer, path: Path, text: str = "new", failure: BaseException | None = None) -> None:
    """Write `text` to a file, or to the file `inside` of a folder, and then fail."""
    with writer(path) as temporary:
        (temporary if writer is whole_file else temporary / "inside").write_text(text)
        if failure is not None:
            raise failure


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_takes_the_place_of_what_was_there_and_nothing_else_stays(tmp_path, writer):
    for text in ("first", "second"):
        put(writer, tmp_path / "name", text)
        assert contents(tmp_path) == {"name" if writer is whole_file else "name/inside": text}


def test_the_old_files_of_a_replaced_folder_are_gone(tmp_path):
    put(whole_folder, tmp_path / "name")
    with whole_folder(tmp_path / "name") as temporary:
        (temporary / "other").write_text("x")
    assert contents(tmp_path) == {"name/other": "x"}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    ("failure", "seen", "message"),
    [
        (NO_SPACE, StorageError, "name: cannot be written: No space left on device; choose a writable place"),
        (
            SafetensorError("Error while serializing: I/O error:\nNo space left on device (os error 28)"),
            StorageError,
            r"name: cannot be written: Error while serializing: I/O error: No space left on device \(os error 28\); ",
        ),
        (DataError("a text is empty"), DataError, "^a text is empty$"),
        (ValueError("a mistake of ours"), ValueError, "^a mistake of ours$"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (SystemExit(3), SystemExit, "^3$"),
    ],
)
def test_any_failure_in_the_middle_leaves_what_was_there(tmp_path, writer, old, failure, seen, message):
    if old:
        put(writer, tmp_path / "name", "old")
    before = contents(tmp_path)
    with pytest.raises(seen, match=message):
        put(writer, tmp_path / "name", "new", failure)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["name"] if old else [])


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("failure", [NO_SPACE, OSError(errno.EIO, "Input/output error")])
def test_a_disk_that_refuses_only_when_flushed_leaves_what_was_there(tmp_path, monkeypatch, writer, failure):
    put(writer, tmp_path / "name", "old")
    before = contents(tmp_path)

    def refuse(_):
        raise failure

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=f"name: cannot be written: {failure.strerror}"):
        put(writer, tmp_path / "name")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failure", [OSError(errno.EBUSY, "Device or resource busy"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2])
def test_a_failure_between_the_two_renames_brings_the_old_folder_back(tmp_path, monkeypatch, failure, call):
    put(whole_folder, tmp_path / "name", "old")
    monkeypatch.setattr("caravan.files._exchange", lambda first, second: False)
    rename, calls = Path.rename, []

    def refuse_once(self, target):
        calls.append(target)
        if len(calls) == call:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_once)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else StorageError):
        put(whole_folder, tmp_path / "name")
    assert contents(tmp_path) == {"name/inside": "old"}


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_right_after_a_rename_leaves_one_whole_folder(tmp_path, monkeypatch, call):
    put(whole_folder, tmp_path / "name", "old")
    monkeypatch.setattr("caravan.files._exchange", lambda first, second: False)
    rename, calls = Path.rename, []

    def interrupt(self, target):
        calls.append(target)
        rename(self, target)
        if len(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        put(whole_folder, tmp_path / "name")
    assert contents(tmp_path) == {"name/inside": "old" if call == 1 else "new"}


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_on_linux_old_and_new_folder_change_places_in_one_step(tmp_path, monkeypatch):
    put(whole_folder, tmp_path / "name", "old")
    if not files._exchange(tmp_path / "name", tmp_path / "name"):
        pytest.skip("this file system cannot exchange names")

    def refuse(self, target):
        raise AssertionError("a kill between two renames would leave no folder of this name")

    monkeypatch.setattr(Path, "rename", refuse)
    put(whole_folder, tmp_path / "name", "new")
    assert contents(tmp_path) == {"name/inside": "new"}


def test_whoever_changes_a_file_alone_keeps_others_waiting(tmp_path):
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with files.alone(tmp_path / "name"):
            order.append("second")

    waiting = threading.Thread(target=second)
    waiting.start()
    with files.alone(tmp_path / "name"):
        inside.set()
        waiting.join(0.2)  # it would be through by now if nothing held it
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_a_place_that_cannot_be_locked_is_a_storage_error(tmp_path):
    with (
        pytest.raises(StorageError, match="none/name: cannot be written: No such file"),
        files.alone(tmp_path / "none" / "name"),
    ):
        raise AssertionError("never reached")


def test_a_failure_inside_a_folder_is_told_with_the_folders_own_name(tmp_path):
    with (
        pytest.raises(StorageError, match=rf"^{tmp_path}/name/part: cannot be written: No space left on device; "),
        whole_folder(tmp_path / "name") as temporary,
    ):
        put(whole_file, temporary / "part", failure=NO_SPACE)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_where_a_folder_is_needed_is_a_storage_error(tmp_path, writer):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(StorageError, match="file/name: cannot be written: Not a directory"):
        put(writer, tmp_path / "file" / "name")
    assert contents(tmp_path) == {"file": "keep"}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_of_the_other_kind_is_refused_before_the_work_and_kept(tmp_path, writer):
    put(whole_folder if writer is whole_file else whole_file, tmp_path / "name", "keep")
    before = contents(tmp_path)
    with pytest.raises(StorageError, match="name: is a f"), writer(tmp_path / "name"):
        pytest.fail("the work was begun")
    assert contents(tmp_path) == before


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="pipe: is a folder or a device"):
        put(whole_file, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_missing_folder_is_known_before_the_work(tmp_path):
    with (
        pytest.raises(StorageError, match="name: cannot be written: No such file or directory"),
        whole_file(tmp_path / "gone" / "name"),
    ):
        pytest.fail("the work was begun")


def test_the_folders_above_are_made_and_on_failure_removed_again(tmp_path):
    with pytest.raises(StorageError):
        put(whole_folder, tmp_path / "a" / "b" / "name", failure=NO_SPACE)
    assert list(tmp_path.iterdir()) == []
    put(whole_folder, tmp_path / "a" / "b" / "name")
    assert contents(tmp_path) == {"a/b/name/inside": "new"}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(tmp_path, writer):
    put(
        writer, tmp_path / "real" / "name" if writer is whole_folder else make_folder(tmp_path / "real") / "name", "old"
    )
    (tmp_path / "link").symlink_to(tmp_path / "real" / "name")
    put(writer, tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert set(contents(tmp_path / "real").values()) == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path, writer):
    name = "\N{GREEK SMALL LETTER ALPHA}" * 127  # 254 bytes of at most 255
    put(writer, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(StorageError, match="cannot be written: File name too long"):
        put(writer, tmp_path / (name + "\N{GREEK SMALL LETTER ALPHA}"))


@pytest.mark.parametrize("writer", [*WRITERS, make_folder])
def test_a_path_with_a_nul_character_is_a_storage_error(tmp_path, writer):
    with pytest.raises(StorageError, match=r"cannot be written: .*null byte"):
        put(writer, tmp_path / "a\0b")


def test_the_root_of_the_file_system_is_no_place_to_write_to():
    with pytest.raises(StorageError, match="/: is the root of the file system"):
        put(whole_folder, Path("/"))


def test_the_usual_rights_hold_even_for_a_library_that_narrows_them_and_given_ones_are_kept(tmp_path):
    (tmp_path / "usual").write_text("x")
    path = tmp_path / "tensors"
    with whole_file(path) as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
        temporary.chmod(0o600)
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    path.chmod(0o640)
    put(whole_file, path)
    assert path.stat().st_mode & 0o777 == 0o640
    put(whole_folder, tmp_path / "private")
    (tmp_path / "private").chmod(0o700)
    put(whole_folder, tmp_path / "private")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


def test_make_folder_makes_what_is_missing_and_refuses_a_file(tmp_path):
    assert make_folder(str(tmp_path / "a" / "b")) == make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("keep")
    with pytest.raises(StorageError, match="file: cannot be written: File exists"):
        make_folder(tmp_path / "file")


def test_clearing_up_that_fails_does_not_hide_the_first_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        put(whole_file, tmp_path / "name", failure=NO_SPACE)
    monkeypatch.setattr(Path, "rmdir", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        put(whole_folder, tmp_path / "a" / "name", failure=NO_SPACE)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, writer):
    with small_disk(tmp_path / "disk", kib=64) as disk:
        put(writer, disk / "name", "old")
        before = contents(disk)
        with pytest.raises(StorageError, match="name: cannot be written: No space left on device"):
            put(writer, disk / "name", "x" * 100_000)
        assert contents(disk) == before
        with (
            pytest.raises(StorageError, match=r"cannot be written: .*No space left on device"),
            whole_folder(disk / "tensors") as temporary,
        ):
            save_file({"a": torch.zeros(50_000)}, temporary / "a.safetensors")
        assert contents(disk) == before
        assert shutil.disk_usage(disk).used <= 8192


@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_disk_is_a_storage_error(tmp_path, writer):
    with small_disk(tmp_path / "disk", kib=64) as disk:
        put(writer, disk / "name", "old")
        before = contents(disk)
        make_read_only(disk)
        for path in (disk / "name", disk / "fresh"):
            with pytest.raises(StorageError, match=f"{path.name}: cannot be written: Read-only file system"):
                put(writer, path)
        with pytest.raises(StorageError, match="Read-only file system"):
            make_folder(disk / "fresh")
        assert contents(disk) == before


def test_a_file_is_held_until_it_is_closed_and_a_second_holder_only_opens_it(tmp_path):
    path = tmp_path / "name"
    assert not is_held(path)
    first = hold(path)
    assert is_held(path)
    second = hold(path)
    os.write(second, b"second\n")
    os.write(first, b"first\n")
    os.close(second)
    assert is_held(path)
    os.close(first)
    assert not is_held(path)
    assert path.read_text() == "second\nfirst\n"


def test_who_only_looks_does_not_keep_a_file_from_being_held(tmp_path):
    path, stop = tmp_path / "name", threading.Event()
    path.touch()

    def look():
        while not stop.is_set():
            is_held(path)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            handle = hold(path)
            assert is_held(path)
            os.close(handle)
    finally:
        stop.set()
        thread.join()
