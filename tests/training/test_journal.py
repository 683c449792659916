"""A journal keeps every line that it took, shows every change of one, and gets over what a kill or a full disk left."""

import os
import sys
import threading
from pathlib import Path

import pytest

from caravan.errors import PrivacyError
from caravan.training.journal import Journal, replace_file


def add(folder: Path, *numbers: int) -> None:
    journal = Journal(folder)
    with journal.locked(make=True):
        if not journal.exists():
            journal.begin()
        for number in numbers:
            journal.append(journal.read(), {"number": number})


def read(folder: Path) -> list[int]:
    journal = Journal(folder)
    with journal.locked():
        return [value["number"] for value in journal.read().values]


def test_lines_are_read_in_the_order_in_which_they_were_written(tmp_path: Path):
    add(tmp_path / "a/b")
    assert read(tmp_path / "a/b") == []
    add(tmp_path / "a/b", 1, 2)
    add(tmp_path / "a/b", 3)
    assert read(tmp_path / "a/b") == [1, 2, 3]


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("change", ["edit", "remove", "garble", "double", "insert"])
@pytest.mark.parametrize("torn", [False, True])
def test_a_line_that_was_changed_removed_or_added_is_found_out(tmp_path: Path, line: int, change: str, torn: bool):
    add(tmp_path, 11, 12)
    place = tmp_path / "ledger.jsonl"
    if torn:  # a piece of a line lies behind the second one
        place.write_bytes(place.read_bytes() + b'{"num')
    add(tmp_path, 13)
    lines = place.read_bytes().splitlines(keepends=True)
    number = 3 if torn and line == 2 else line
    edited = {
        "edit": [lines[number].replace(b'"number": 1', b'"number": 2')],
        "remove": [],
        "garble": [b'{"number": 1\n'],
        "double": [lines[number]] * 2,
        "insert": [b'{"number": 1\n', lines[number]],
    }[change]
    assert edited != [lines[number]]
    place.write_bytes(b"".join([*lines[:number], *edited, *lines[number + 1 :]]))
    with pytest.raises(PrivacyError, match=r"ledger.jsonl.*changed.*restore the ledger's folder"):
        read(tmp_path)


def test_a_line_before_a_torn_one_cannot_be_taken_away(tmp_path: Path):
    add(tmp_path, 1)
    place = tmp_path / "ledger.jsonl"
    place.write_bytes(place.read_bytes() + b'{"nu')
    add(tmp_path, 2)
    place.write_bytes(b"".join(place.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(PrivacyError, match="line 2: it or what stands before it was changed"):
        read(tmp_path)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_file_that_was_cut_short_is_found_out(tmp_path: Path, keep: int):
    add(tmp_path, 1, 2)
    place = tmp_path / "ledger.jsonl"
    lines = place.read_bytes().splitlines(keepends=True)
    for rest in (b"", lines[keep][:9]):
        place.write_bytes(b"".join(lines[:keep]) + rest)
        with pytest.raises(PrivacyError, match="does not begin with the 2 lines"):
            read(tmp_path)


@pytest.mark.parametrize("damage", [None, b"", b"[]", b"{}", b'{"lines": "x", "hash": ""}'])
def test_a_head_that_is_lost_or_damaged_is_found_out(tmp_path: Path, damage: bytes | None):
    add(tmp_path, 1)
    (tmp_path / "head.json").unlink()
    if damage is not None:
        (tmp_path / "head.json").write_bytes(damage)
    with pytest.raises(PrivacyError, match=r"head.json: is lost or damaged"):
        read(tmp_path)


def test_a_line_that_is_no_entry_is_refused(tmp_path: Path):
    add(tmp_path, 1)
    with (tmp_path / "ledger.jsonl").open("ab") as stream:
        stream.write(b"7\n")
    with pytest.raises(PrivacyError, match="line 2"):
        read(tmp_path)


@pytest.mark.parametrize("length", [1, 20, 60])
@pytest.mark.parametrize("ended", [False, True])
def test_what_a_kill_leaves_of_a_line_is_passed_over_and_stays(tmp_path: Path, length: int, ended: bool):
    add(tmp_path, 1)
    place = tmp_path / "ledger.jsonl"
    left = place.read_bytes() + place.read_bytes()[:length] + (b"\n" if ended else b"")
    place.write_bytes(left)
    assert read(tmp_path) == [1]
    add(tmp_path, 2, 3)
    assert read(tmp_path) == [1, 2, 3]
    assert place.read_bytes().startswith(left)


def test_a_whole_line_counts_though_its_end_and_the_head_were_never_written(tmp_path: Path):
    add(tmp_path, 1)
    place, head = tmp_path / "ledger.jsonl", (tmp_path / "head.json").read_bytes()
    add(tmp_path, 2)
    (tmp_path / "head.json").write_bytes(head)
    place.write_bytes(place.read_bytes()[:-1])
    assert read(tmp_path) == [1, 2]
    add(tmp_path, 3)
    assert read(tmp_path) == [1, 2, 3]


def test_a_disk_that_takes_half_a_line_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add(tmp_path, 1)
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda handle, content: write(handle, content[:40]))
        with pytest.raises(PrivacyError, match="did not take the entry"):
            add(tmp_path, 2)
    assert read(tmp_path) == [1]
    add(tmp_path, 3)
    assert read(tmp_path) == [1, 3]


def test_a_place_that_cannot_be_used_is_told_on_one_line(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PrivacyError, match="file: the privacy ledger cannot be used: File exists"):
        add(tmp_path / "file", 1)
    with pytest.raises(PrivacyError, match="No such file"):
        read(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_system_without_file_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(PrivacyError, match="needs file locks"):
        add(tmp_path, 1)


def test_threads_take_turns(tmp_path: Path):
    add(tmp_path)
    threads = [threading.Thread(target=add, args=(tmp_path, number)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read(tmp_path)) == list(range(8))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace_file(tmp_path / "a", b"old")
    with monkeypatch.context() as patched:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    replace_file(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"
