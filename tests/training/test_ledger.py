"""The ledger never goes down: not by reopening, kills, torn lines, other labels or a second process; edits show."""

import json
import signal
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import platformdirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.data.records import Example
from caravan.errors import PrivacyError
from caravan.training.accounting import Mechanism, epsilon
from caravan.training.journal import Journal
from caravan.training.ledger import Ledger, Units, default_folder, identify, read_ledger

DELTA = 1e-5
STEPS = Mechanism(1.0, 8.0, 1)


def units(*names: str, kind: str = "example") -> Units:
    return Units(kind, frozenset(names))  # pyright: ignore[reportArgumentType]


def reserve(folder: Path, *names: str, steps: int = 1, cap: float | None = None, **options) -> Ledger:
    ledger = Ledger.open(folder, units(*names), **options)
    ledger.reserve(Mechanism(1.0, 8.0, steps), cap=cap, delta=DELTA)
    return ledger


def total(ledger: Ledger) -> int:
    return sum(each.steps for each in ledger.spent())


def test_what_is_reserved_is_there_when_the_ledger_is_opened_again(tmp_path: Path):
    ledger = Ledger.open(tmp_path / "a/ledger", units("x", "y"))
    assert ledger.spent() == []
    assert ledger.guarantee(DELTA).epsilon == 0
    first, second = Mechanism(0.1, 1.3, 7), Mechanism(0.25, 2.0, 1)
    ledger.reserve(first, cap=None, delta=DELTA, stage="head")
    ledger.reserve(second, cap=None, delta=DELTA)
    again = Ledger.open(tmp_path / "a/ledger", units("y", "x"))
    assert again.spent() == ledger.spent() == [first, second]
    assert again.guarantee(DELTA) == epsilon([first, second], DELTA)


def test_data_that_shares_a_single_unit_counts_in_full_and_other_data_does_not(tmp_path: Path):
    reserve(tmp_path, "a", "b", "c", steps=5)
    assert total(Ledger.open(tmp_path, units("a", "b"))) == 5  # a row removed
    assert total(Ledger.open(tmp_path, units("c", "d", "e"))) == 5
    assert total(Ledger.open(tmp_path, units("d", "e"))) == 0
    reserve(tmp_path, "c", "d", steps=2)
    assert total(Ledger.open(tmp_path, units("c"))) == 7
    assert total(Ledger.open(tmp_path, units("d"))) == 2


def test_examples_are_known_by_their_texts_whatever_their_labels_case_and_spacing():
    plain = identify([Example("Flat  after\n10 km", ("d1",)), Example("no", ("d2",))])
    other = identify([Example(" no", ("spam",)), Example("flat after 10 KM", ("ham", "x"), "q7")])
    assert plain == other
    assert plain.kind == "example"
    assert len(plain.names) == 2
    assert identify([Example("Other", ("d1",))]).names.isdisjoint(plain.names)


def test_users_are_known_by_their_name_and_their_texts():
    rows = [Example("a", ("d",), columns={"who": "ann"}), Example("b", ("d",), columns={"who": "ann"})]
    named = identify(rows, "who")
    assert named.kind == "user"
    assert len(named.names) == 3
    assert identify(rows).names < named.names
    assert identify([Example("user ann", ("d",))]).names.isdisjoint(named.names)
    with pytest.raises(PrivacyError, match=r"'q1' has no 'who'"):
        identify([Example("a", ("d",), "q1")], "who")
    with pytest.raises(PrivacyError, match="no examples"):
        identify([])


def test_guarantees_for_examples_and_for_users_are_not_added_up(tmp_path: Path):
    rows = [Example("a", ("d",), columns={"who": "ann"})]
    Ledger.open(tmp_path, identify(rows)).reserve(STEPS, cap=None, delta=DELTA)
    ledger = Ledger.open(tmp_path, identify(rows, "who"))
    for refused in (ledger.spent, lambda: ledger.reserve(STEPS, cap=None, delta=DELTA)):
        with pytest.raises(PrivacyError, match="'example' before, and now unit = 'user'"):
            refused()


def test_a_row_lies_in_one_part_of_a_run_but_a_user_may_lie_in_several(tmp_path: Path):
    reserve(tmp_path, "ok", "a", steps=3, run="r1", part="client-0")
    other = reserve(tmp_path, "ok", "b", steps=4, run="r1", part="client-1")
    assert total(other) == 4
    assert total(Ledger.open(tmp_path, units("a", "ok"), run="r1", part="client-0")) == 3
    assert total(Ledger.open(tmp_path, units("ok"), run="r2", part="client-0")) == 7
    assert total(Ledger.open(tmp_path, units("ok"))) == 7
    of_user = units("ann", kind="user")
    for part in ("client-0", "client-1"):
        ledger = Ledger.open(tmp_path, of_user, run="r1", part=part)
        ledger.reserve(STEPS, cap=None, delta=DELTA)
    assert total(ledger) == 2


def test_parts_without_a_run_are_counted(tmp_path: Path):
    reserve(tmp_path, "a", part="one")
    assert total(reserve(tmp_path, "a", part="two")) == 2


def test_a_cap_refuses_before_anything_is_written(tmp_path: Path):
    ledger = Ledger.open(tmp_path, units("a"))
    cap = epsilon([Mechanism(1.0, 8.0, 3)], DELTA).epsilon
    for _ in range(3):
        ledger.reserve(STEPS, cap=cap, delta=DELTA)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    for limit in (cap, 0.0, -1.0, float("nan")):
        with pytest.raises(PrivacyError, match="cap is"):
            ledger.reserve(STEPS, cap=limit, delta=DELTA)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    ledger.reserve(STEPS, cap=None, delta=DELTA)
    assert total(ledger) == 4


def test_steps_without_noise_are_entered_and_nothing_fits_under_a_cap_after_them(tmp_path: Path):
    ledger = Ledger.open(tmp_path, units("a"))
    free = Mechanism(0.5, 0.0, 2)
    with pytest.raises(PrivacyError, match="from 0 to infinity"):
        ledger.reserve(free, cap=1e9, delta=DELTA)
    ledger.reserve(free, cap=None, delta=DELTA)
    with pytest.raises(PrivacyError, match="from infinity to infinity"):
        ledger.reserve(STEPS, cap=1e9, delta=DELTA)


def test_no_file_tells_a_text_and_no_other_account_may_read_one(tmp_path: Path):
    folder = tmp_path / "ledger"
    reserve(folder, "text my secret illness")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {"ledger.jsonl", "head.json", "secret", "lock"}
    for path in files:
        assert b"illness" not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "units")} == {0o700}
    elsewhere = reserve(tmp_path / "other", "text my secret illness")
    assert not (folder / "units" / f"{elsewhere.data}.npy").exists()  # another key, other hashes


def test_an_entry_says_what_accounting_needs_and_not_how_large_the_data_is(tmp_path: Path):
    ledger = Ledger.open(tmp_path, units("a"), run="r", part="p")
    ledger.reserve(Mechanism(0.125, 1.5, 9), cap=None, delta=DELTA, stage="adapter")
    entry = json.loads((tmp_path / "ledger.jsonl").read_text(encoding="ascii"))
    assert entry.pop("time").endswith("+00:00")
    assert len(entry.pop("previous")) == 64
    assert entry == {
        **{"data": ledger.data, "unit": "example", "stage": "adapter", "run": "r", "part": "p"},
        **{"sampling": 0.125, "sigma": 1.5, "steps": 9},
    }


def filled(folder: Path) -> Path:
    for steps in (1, 2, 3):
        reserve(folder, "a", steps=steps)
    return folder / "ledger.jsonl"


def check_refuses(folder: Path, says: str) -> None:
    with pytest.raises(PrivacyError, match=says):
        Ledger.open(folder, units("a")).spent()


def test_a_file_that_is_lost_or_damaged_is_found_out(tmp_path: Path):
    place = filled(tmp_path)
    place.rename(tmp_path / "kept")
    check_refuses(tmp_path, "ledger.jsonl: was changed")
    (tmp_path / "kept").rename(place)
    for name in ("head.json", "secret", f"units/{Ledger.open(tmp_path, units('a')).data}.npy"):
        for damage in (b"", b"{}", None):
            content = (tmp_path / name).read_bytes()
            (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
            check_refuses(tmp_path, f"{Path(name).name}: is lost or damaged")
            (tmp_path / name).write_bytes(content)
    assert total(Ledger.open(tmp_path, units("a"))) == 6
    place.unlink()
    (tmp_path / "head.json").unlink()
    check_refuses(tmp_path, "head.json: is lost")


def test_units_that_would_run_code_when_read_are_refused(tmp_path: Path):
    filled(tmp_path)
    file = next((tmp_path / "units").iterdir())
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    check_refuses(tmp_path, "is lost or damaged")


def test_an_entry_of_a_later_version_is_not_passed_over(tmp_path: Path):
    reserve(tmp_path, "a")
    journal = Journal(tmp_path)
    with journal.locked():
        journal.append(journal.read(), {"sampling": 0.5, "sigma": 1.0, "steps": 3, "mechanism": "of the future"})
    check_refuses(tmp_path, "cannot be read.*use a later caravan")


def test_a_ledger_that_was_deleted_or_replaced_while_in_use_takes_nothing(tmp_path: Path):
    ledger = reserve(tmp_path / "ledger", "a")
    (tmp_path / "ledger").rename(tmp_path / "moved")
    with pytest.raises(PrivacyError, match="No such file"):
        ledger.reserve(STEPS, cap=None, delta=DELTA)
    reserve(tmp_path / "ledger", "a")
    with pytest.raises(PrivacyError, match="was replaced"):
        ledger.reserve(STEPS, cap=None, delta=DELTA)


def test_a_kill_while_the_folder_is_made_is_got_over(tmp_path: Path):
    (tmp_path / "secret").write_bytes(bytes(32))
    assert total(reserve(tmp_path, "a")) == 1
    assert (tmp_path / "secret").read_bytes() == bytes(32)


def test_a_place_that_cannot_be_used_is_told_on_one_line(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PrivacyError, match="file: the privacy ledger cannot be used: File exists"):
        Ledger.open(tmp_path / "file", units("a"))
    with pytest.raises(PrivacyError, match="there is no privacy ledger"):
        read_ledger(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_default_folder_is_no_run_s_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CARAVAN_LEDGER", "some/place")
    assert default_folder() == Path("some/place")
    monkeypatch.delenv("CARAVAN_LEDGER")
    assert default_folder() == platformdirs.user_data_path("caravan") / "ledger"


def test_a_folder_s_data_sets_are_listed_with_their_entries(tmp_path: Path):
    reserve(tmp_path, "a", "b", steps=1)
    reserve(tmp_path, "b", "c", steps=2)
    reserve(tmp_path, "a", "b", steps=3)
    (first, own), (second, others) = read_ledger(tmp_path)
    assert [entry.mechanism.steps for entry in own] == [1, 3]
    assert [entry.mechanism.steps for entry in others] == [2]
    assert total(first) == total(second) == 6
    assert first.hashes.shape == (2,)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sets(st.sampled_from("abcd"), min_size=1), st.integers(1, 3)),
        st.tuples(st.just("torn"), st.floats(0, 1), st.booleans()),
        st.tuples(st.just("killed before the head"), st.sets(st.sampled_from("abcd"), min_size=1), st.booleans()),
    ),
    max_size=8,
)


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_nothing_that_counted_ever_stops_counting(operations):
    with TemporaryDirectory() as name:
        folder, due = Path(name), {letter: Counter() for letter in "abcd"}
        place = folder / "ledger.jsonl"
        for kind, what, how in operations:
            if kind == "torn":
                Ledger.open(folder, units("a"))
                before = place.read_bytes() if place.exists() else b""
                line = b'{"time": "now", "data": "abc", "sampling": 0.5, "sigma": 1.0, "steps": 12}'
                part = line[: 1 + int(what * (len(line) - 2))]
                gap = b"" if before.endswith(b"\n") or not before else b"\n"
                place.write_bytes(before + gap + part + (b"\n" if how else b""))
                continue
            head = (folder / "head.json").read_bytes() if (folder / "head.json").exists() else None
            steps = how if kind == "reserve" else 1
            reserve(folder, *what, steps=steps)
            if kind != "reserve" and head is not None:
                (folder / "head.json").write_bytes(head)
                if how:
                    place.write_bytes(place.read_bytes()[:-1])
            due = reachable(due, what, steps)
        for letter, counted in due.items():
            found = Counter(each.steps for each in Ledger.open(folder, units(letter)).spent())
            assert found == counted


def reachable(due: dict[str, Counter], data: set[str], steps: int) -> dict[str, Counter]:
    """What each unit alone has been used for: every entry whose data has it."""
    return {letter: counted + Counter([steps] if letter in data else []) for letter, counted in due.items()}


@given(st.lists(st.tuples(st.sampled_from(["ab", "bc", "b"]), st.integers(1, 3)), max_size=8), st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_epsilon_never_falls_and_never_crosses_the_cap(requests: list[tuple[str, int]], most: int):
    cap = epsilon([Mechanism(1.0, 8.0, most)], DELTA).epsilon
    with TemporaryDirectory() as name:
        before = 0.0
        for data, steps in requests:
            fits = total(Ledger.open(name, units(*data))) + steps <= most
            try:
                reserve(Path(name), *data, steps=steps, cap=cap)
            except PrivacyError:
                assert not fits
            else:
                assert fits
            now = Ledger.open(name, units("b")).guarantee(DELTA).epsilon
            assert before <= now <= cap
            before = now


LOOP = """
import sys
from caravan.training.accounting import Mechanism
from caravan.training.ledger import Ledger, Units
ledger = Ledger.open(sys.argv[1], Units("example", frozenset("ab")))
while True:
    ledger.reserve(Mechanism(1.0, 8.0, 1), cap=None, delta=1e-5)
    print("reserved", flush=True)
"""


@pytest.mark.parametrize("count", [1, 7, 30])
def test_a_process_that_is_killed_leaves_all_that_it_was_granted(tmp_path: Path, count: int):
    granted = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(count)]
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL
        granted += (b"".join(lines) + rest).count(b"reserved\n")
        found = total(Ledger.open(tmp_path, units("a")))
        assert granted <= found <= granted + 1  # the last one may not have been told
        granted = found


CAPPED = """
import sys
from caravan.errors import PrivacyError
from caravan.training.accounting import Mechanism
from caravan.training.ledger import Ledger, Units
ledger = Ledger.open(sys.argv[1], Units("example", frozenset("a")))
try:
    while True:
        ledger.reserve(Mechanism(1.0, 8.0, 1), cap=float(sys.argv[2]), delta=1e-5)
        print("reserved", flush=True)
except PrivacyError:
    print("refused")
"""


def test_processes_at_once_do_not_cross_a_cap_together(tmp_path: Path):
    cap = epsilon([Mechanism(1.0, 8.0, 6)], DELTA).epsilon
    words = [sys.executable, "-c", CAPPED, str(tmp_path), str(cap)]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(3)]
    said = b"".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert said.count(b"refused\n") == 3
    assert said.count(b"reserved\n") == total(Ledger.open(tmp_path, units("a"))) == 6
