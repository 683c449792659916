"""Keys: where they come from and what they give the right to."""

from pathlib import Path

import pytest

from caravan.app.web.access import Keys, read_keys
from caravan.app.web.limits import RefusedError
from caravan.errors import ConfigError

LONG, OTHER = "a" * 16, "b" * 16


def bearing(key: str, **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **headers}


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n\nread {LONG}\nwrite {OTHER}\n")
    keys = read_keys(tmp_path / "keys", {"CARAVAN_READ_KEYS": f"{'c' * 16}, {'d' * 16}"}, local_changes=False)
    assert [right for _, right in keys.hashes] == ["read", "write", "read", "read"]
    for key in (LONG, OTHER, "c" * 16, "d" * 16):
        keys.check("read", bearing(key), None)
    keys.check("write", bearing(OTHER), None)
    assert LONG not in repr(keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LONG, "line 1: not a key"),
        (f"\nadmin {LONG}", "line 2: not a key"),
        ("read short", "at least 16"),
        (f"read {'ä' * 16}", "ASCII"),
    ],
)
def test_a_file_of_another_form_is_refused_without_showing_a_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=words) as refusal:
        read_keys(tmp_path / "keys", {}, local_changes=False)
    assert not {LONG, "short", "ä" * 16} & set(str(refusal.value).split())


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "none", {}, local_changes=False)


def test_without_keys_everybody_reads() -> None:
    Keys().check("read", {}, "192.0.2.1")
    Keys().check("read", bearing(LONG), "192.0.2.1")


@pytest.mark.parametrize("headers", [{}, {"authorization": "Basic abc"}, {"authorization": "Bearer "}, bearing("ü")])
def test_with_keys_nobody_reads_without(headers: dict[str, str]) -> None:
    with pytest.raises(RefusedError) as refusal:
        read_keys(None, {"CARAVAN_READ_KEYS": LONG}, local_changes=False).check("read", headers, "127.0.0.1")
    assert refusal.value.status == 401


def test_loopback_gives_no_right_where_there_is_a_write_key() -> None:
    keys = read_keys(None, {"CARAVAN_WRITE_KEYS": LONG}, local_changes=True)
    with pytest.raises(RefusedError):
        keys.check("write", {"host": "localhost"}, "127.0.0.1")


@pytest.mark.parametrize(
    ("peer", "headers", "passes"),
    [
        ("127.0.0.1", {"host": "127.0.0.1:8000"}, True),
        ("::1", {"host": "[::1]:8000"}, True),
        ("127.0.0.1", {"host": "localhost:8000", "origin": "http://localhost:8000"}, True),
        ("127.0.0.1", {"host": "localhost:8000", "origin": "null"}, False),
        ("127.0.0.1", {"host": "localhost:8000", "origin": "http://localhost:9000"}, False),
        ("127.0.0.1", {"host": "rebound.example.org"}, False),
        ("127.0.0.1", {}, False),
        ("192.0.2.1", {"host": "localhost"}, False),
        (None, {"host": "localhost"}, False),
    ],
)
def test_local_changes_come_from_this_machine_and_from_no_other_sites_page(peer, headers, passes: bool) -> None:
    keys = Keys(local_changes=True)
    if passes:
        keys.check("write", headers, peer)
        return
    with pytest.raises(RefusedError) as refusal:
        keys.check("write", headers, peer)
    assert refusal.value.status == 403
