"""Versions: exchanged in one step, kept, found again, with the documents of today; kills, full disks, other writers."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from caravan.app.feedback.versions import Versions, onto
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.errors import DataError, StorageError
from caravan.storage import load, save
from disks import small_disk
from saved_retrievers import DOCUMENTS, make_retriever
from toy_training import assert_same_bits

BELL = Document("bell", "turn the ring to the left", "The bell")


@pytest.fixture
def model(tmp_path: Path, bert) -> Path:
    return save(make_retriever(bert), tmp_path / "model")


def _improved(model: Path, seed: int, **options) -> int:
    """Put other weights in place, as an improvement does."""
    old = load(model)
    new = make_retriever(old.encoder.backbone, tuple(old.catalogue), seed=seed)
    new.record = {"config": {}, "seed": seed}
    return Versions(model).replace(old, new, what=f"seed {seed}", comparison={"tallies": []}, **options)


def _shown(model: Path) -> list[tuple[int, bool, int | None, str]]:
    return [(version.number, version.current, version.of, version.what) for version in Versions(model).listed()]


def test_a_training_is_version_one_and_nothing_is_made(model: Path) -> None:
    assert _shown(model) == [(1, True, None, "trained")]
    assert Versions(model).listed()[0].time.endswith("Z")
    assert not Versions(model).folder.parent.exists()


def test_new_weights_take_the_place_of_old_ones_which_are_kept_bit_for_bit(model: Path) -> None:
    before = load(model).trainable_state()
    assert _improved(model, 1) == 2
    assert _shown(model) == [(2, True, 1, "seed 1"), (1, False, None, "trained")]
    assert load(model).record["seed"] == 1
    assert_same_bits(load(Versions(model).folder / "1").trainable_state(), before)


def test_back_and_forth_gives_the_same_bits(model: Path) -> None:
    first = load(model).trainable_state()
    _improved(model, 1)
    second = load(model).trainable_state()
    assert Versions(model).back() == 1
    assert_same_bits(load(model).trainable_state(), first)
    assert _shown(model) == [(2, False, 1, "seed 1"), (1, True, None, "trained")]
    assert Versions(model).back(2) == 2
    assert_same_bits(load(model).trainable_state(), second)


def test_back_follows_where_a_version_came_from(model: Path) -> None:
    for seed in (1, 2):
        _improved(model, seed)
    Versions(model).back(1)
    assert _improved(model, 3) == 4  # a number is never used twice
    assert Versions(model).back() == 1
    assert [number for number, *_ in _shown(model)] == [4, 3, 2, 1]


def test_documents_stay_as_they_are_now(model: Path, bert) -> None:
    _improved(model, 1)
    present = load(model)
    edited = Document("login", "a new text of an old document")
    today = Catalogue([DOCUMENTS[0], edited, BELL])  # money is gone
    save(onto(present, today), model)
    old = load(Versions(model).folder / "1")
    Versions(model).back()
    now = load(model)
    assert now.catalogue.fingerprint == Catalogue([DOCUMENTS[0], edited, BELL]).fingerprint
    assert now.record["changes"] == {"added": 1, "replaced": 1, "removed": 1}
    for row in (0, 1):  # what was trained stays
        assert now.head.rows[row].equal(old.head.rows[row])
    assert now.search("turn the ring to the left", 1)[0].doc_id  # and the new one can be found
    Versions(model).back(2)
    assert set(load(model).catalogue.ids) == {"parcel", "login", "bell"}


def test_documents_that_came_while_new_weights_were_trained_are_in_them(model: Path, bert) -> None:
    old = load(model)
    new = make_retriever(old.encoder.backbone, seed=5)
    save(onto(load(model), Catalogue([*DOCUMENTS, BELL])), model)
    Versions(model).replace(old, new, what="x", comparison={})
    assert load(model).catalogue.ids == ("parcel", "login", "money", "bell")


def test_weights_that_somebody_else_exchanged_meanwhile_are_not_overwritten(model: Path) -> None:
    old = load(model)
    _improved(model, 1)
    new = make_retriever(old.encoder.backbone, seed=2)
    with pytest.raises(StorageError, match="meanwhile; try again"):
        Versions(model).replace(old, new, what="x", comparison={})
    assert load(model).record["seed"] == 1


def test_a_training_into_the_same_folder_gets_a_number_of_its_own(model: Path, bert) -> None:
    _improved(model, 1)
    save(make_retriever(bert, seed=9), model)  # `caravan train --out`
    assert [number for number, *_ in _shown(model)] == [2, 1]
    assert _improved(model, 2) == 3


def test_the_oldest_go_but_never_the_way_back(model: Path) -> None:
    for seed in range(1, 5):
        _improved(model, seed, keep=2)
    assert [number for number, *_ in _shown(model)] == [5, 4, 3]
    Versions(model).back(3, keep=2)
    _improved(model, 9, keep=1)
    assert _shown(model)[0][:3] == (6, True, 3)
    assert 3 in [number for number, *_ in _shown(model)]


def test_where_there_is_no_way_back_it_says_which_there_are(model: Path) -> None:
    with pytest.raises(DataError, match="came from no other; name one, kept are: none"):
        Versions(model).back()
    _improved(model, 1)
    with pytest.raises(DataError, match="version 2 is in place; name another, kept are: 1"):
        Versions(model).back(2)
    with pytest.raises(DataError, match="no version 7 is kept; name another, kept are: 1"):
        Versions(model).back(7)


def test_a_damaged_version_is_listed_as_such_and_refused(model: Path) -> None:
    _improved(model, 1)
    before = load(model).trainable_state()
    (Versions(model).folder / "1" / "training.json").write_text("{")
    assert _shown(model)[1][3].startswith("damaged: ")
    with pytest.raises(StorageError):
        Versions(model).back()
    assert_same_bits(load(model).trainable_state(), before)


def test_of_no_retriever_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such folder"):
        Versions(tmp_path / "none").listed()
    with pytest.raises(StorageError, match="no such folder"):
        Versions(tmp_path / "none").back()
    assert list(tmp_path.iterdir()) == []


def test_a_retriever_on_its_own_documents_is_not_touched(model: Path) -> None:
    retriever = load(model)
    assert onto(retriever, retriever.catalogue) is retriever


def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, model: Path) -> None:
    size = sum(path.stat().st_size for path in model.iterdir()) // 1024
    for room in (size // 2, int(size * 1.3)):  # no place for the copy, or none for the new one
        with small_disk(tmp_path / f"disk{room}", kib=size + room + 40) as disk:
            shutil.copytree(model, disk / "model")
            before = load(disk / "model").trainable_state()
            with pytest.raises(StorageError, match="No space left"):
                _improved(disk / "model", 1)
            assert_same_bits(load(disk / "model").trainable_state(), before)
            assert _shown(disk / "model")[0][:2] == (1, True)


# Forks, so that the many children need not import torch and load a model again; with one thread, as forks ask for.
_KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}]
    import caravan.files
    from caravan.app.feedback.versions import Versions
    from caravan.storage import load
    from saved_retrievers import make_retriever

    left = 0

    def counted(function):
        def call(*arguments, **options):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    old = load(sys.argv[2])  # all places are alike
    new = make_retriever(old.encoder.backbone, seed=7)

    def exchange(model, command):
        for name in ("rename", "unlink", "mkdir", "write_text", "replace"):
            setattr(Path, name, counted(getattr(Path, name)))
        for name in ("_swap", "_flush", "_exchange"):
            setattr(caravan.files, name, counted(getattr(caravan.files, name)))
        if command == "back":
            Versions(model).back()
        else:
            Versions(model).replace(old, new, what="x", comparison={{}}, keep=1)

    for step, place in enumerate(sys.argv[2:], start=1):
        child = os.fork()
        if not child:
            left = step
            exchange(Path(place), sys.argv[1])
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)
        if status == 0:
            break
""")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["replace", "back"])
def test_a_kill_at_any_file_operation_leaves_one_version_whole_in_place_and_none_lost(
    tmp_path: Path, model: Path, command: str
) -> None:
    _improved(model, 1)
    states = {1: load(Versions(model).folder / "1").trainable_state(), 2: load(model).trainable_state()}
    places = [tmp_path / f"killed{step}" for step in range(1, 150)]
    for place in places:
        shutil.copytree(model, place)
        shutil.copytree(Versions(model).folder.parent, Versions(place).folder.parent)
    code = _KILLED.format(tests=str(Path(__file__).parents[1]))
    arguments = [sys.executable, "-c", code, command, *places]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, env=env)
    statuses = [int(status) for status in done.stdout.split()]
    assert statuses[-1] == 0  # more operations than kills
    assert set(statuses[:-1]) == {-signal.SIGKILL}
    assert len(statuses) > 10
    for place, status in zip(places, statuses, strict=False):
        listed = Versions(place).listed()
        found = {version.number for version in listed}
        assert not [version for version in listed if version.what.startswith("damaged")]
        # The oldest may go once the new one is in place.
        assert {1, 2} <= found or {2, 3} <= found
        assert status or command == "back" or 3 in found
        current = load(place)
        number = current.record["version"]["number"]
        if number in states:
            assert_same_bits(current.trainable_state(), states[number])
        for other in found & states.keys() - {number}:
            assert_same_bits(load(Versions(place).folder / str(other)).trainable_state(), states[other])
        _improved(place, 3)  # it goes on, and clears what was left
        assert not [path for path in Versions(place).folder.iterdir() if path.name.startswith(".")]
