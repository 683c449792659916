import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from caravan.config import AdapterConfig, BackboneConfig
from caravan.errors import DataError
from caravan.model.adapter import IdentityAdapter, make_adapter
from caravan.model.backbone import load_backbone
from caravan.model.encoder import Encoder
from caravan.training import features
from caravan.training.features import FeatureStore, default_cache
from toy_training import toy_backbone, toy_retriever

TEXTS = ["secret words", "b c", "a longer text of more words", "secret words", "d"]


@pytest.fixture
def encoder(backbone):
    return Encoder(backbone, IdentityAdapter(backbone.embedding_width))


@pytest.fixture
def encoded(monkeypatch):
    """The texts that any encoder computes, call by call."""
    calls: list[list[str]] = []
    original = Encoder.encode

    def encode(self, texts, **options):
        calls.append(list(texts))
        return original(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", encode)
    return calls


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def alter(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as base, base:
        base.execute(statement, values)


def test_each_distinct_text_is_encoded_once_and_a_second_run_reads_all_from_disk(encoder, encoded, tmp_path):
    first = FeatureStore(tmp_path).encode(encoder, TEXTS)
    assert [sorted(call) for call in encoded] == [sorted(set(TEXTS))]
    again = FeatureStore(tmp_path).encode(encoder, TEXTS)
    assert len(encoded) == 1
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert torch.equal(first[0], first[3])


def test_cached_and_uncached_vectors_are_the_encoders_own(encoder, tmp_path):
    plain = FeatureStore().encode(encoder, TEXTS)
    FeatureStore(tmp_path).encode(encoder, TEXTS)
    cached = FeatureStore(tmp_path).encode(encoder, TEXTS)
    assert torch.equal(plain, cached)
    for index, text in enumerate(TEXTS):
        torch.testing.assert_close(plain[index], encoder.encode([text])[0])


def test_only_what_is_missing_is_computed_and_every_vector_stands_in_its_place(encoder, encoded, tmp_path):
    store = FeatureStore(tmp_path)
    store.encode(encoder, ["b c", "other"])
    vectors = store.encode(encoder, TEXTS)
    assert sorted(encoded[1]) == ["a longer text of more words", "d", "secret words"]
    torch.testing.assert_close(vectors, FeatureStore().encode(encoder, TEXTS))


def test_more_texts_than_one_look_up_and_one_write_hold(encoder, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_LOOKUP", 3)
    monkeypatch.setattr(features, "_CHUNK", 4)
    texts = ["abcdefghijk"[: 1 + index % 11] + f" {index}" for index in range(10)]
    done = []
    first = FeatureStore(tmp_path).encode(encoder, texts, progress=done.append)
    assert [len(call) for call in encoded] == [4, 4, 2]
    assert done == [0, 4, 4, 2]
    assert torch.equal(first, FeatureStore(tmp_path).encode(encoder, texts))
    assert len(encoded) == 3
    torch.testing.assert_close(first, encoder.encode(texts))


def test_what_was_computed_before_a_kill_is_kept(encoder, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_CHUNK", 2)
    seen = []

    def stop(count):
        seen.append(count)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureStore(tmp_path).encode(encoder, TEXTS, progress=stop)
    encoded.clear()
    resumed = FeatureStore(tmp_path).encode(encoder, TEXTS)
    assert [len(call) for call in encoded] == [2]  # of four distinct texts, two were written
    assert torch.equal(resumed, FeatureStore().encode(encoder, TEXTS))


def test_another_pooling_length_limit_or_adapter_makes_another_key(tmp_path, encoded):
    name = str(toy_backbone(tmp_path / "bert").config.name)
    cache = tmp_path / "cache"
    settings = [
        BackboneConfig(name=name),
        BackboneConfig(name=name, pooling="cls"),
        BackboneConfig(name=name, max_tokens=5),
        BackboneConfig(name=name, normalize=False),
    ]
    encoders = [Encoder(load_backbone(each), IdentityAdapter(32)) for each in settings]
    trained = make_adapter(AdapterConfig(), 32)
    with torch.no_grad():
        trained.matrix[0, 1] = 0.5
    encoders.append(Encoder(load_backbone(settings[0]), trained))
    for number, each in enumerate(encoders, start=1):
        ours = FeatureStore(cache).encode(each, TEXTS)
        assert len(encoded) == number
        assert len(list(cache.iterdir())) == number
        torch.testing.assert_close(ours, FeatureStore().encode(each, TEXTS))
        encoded.pop()
    assert len({each.key() for each in encoders}) == 5


def test_an_untrained_adapter_shares_the_bare_backbones_vectors(backbone, encoder, encoded, tmp_path):
    FeatureStore(tmp_path).encode(encoder, TEXTS)
    for kind in ("full", "lowrank", "core"):
        FeatureStore(tmp_path).encode(toy_retriever(backbone, adapter=kind).encoder, TEXTS)
    assert [call for call in encoded if "d" in call] == [encoded[0]]
    assert len(list(tmp_path.iterdir())) == 1


def test_no_text_is_stored(encoder, tmp_path):
    FeatureStore(tmp_path).encode(encoder, TEXTS)
    content = only_file(tmp_path).read_bytes()
    for text in set(TEXTS) - {"d"}:  # one letter occurs in any file
        assert text.encode() not in content
        assert text.encode("utf-16-le") not in content


def test_no_folder_keeps_nothing_and_no_texts_are_no_vectors(encoder, encoded, tmp_path):
    FeatureStore().encode(encoder, TEXTS)
    FeatureStore().encode(encoder, TEXTS)
    assert len(encoded) == 2
    assert FeatureStore(tmp_path).encode(encoder, []).shape == (0, 32)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_text_is_refused(encoder, tmp_path):
    with pytest.raises(DataError, match="empty"):
        FeatureStore(tmp_path).encode(encoder, ["a", " "])


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE features SET vector = substr(vector, 1, 100)",
        "UPDATE features SET vector = substr(vector, 1, 101)",  # no whole number of floats
        "UPDATE features SET vector = vector || x'00'",
        "UPDATE features SET vector = x''",
        "UPDATE features SET vector = zeroblob(length(vector))",
        "UPDATE features SET vector = 7",
        "UPDATE features SET vector = 'words'",
        # Another text's vector, whole and sound, under this text's key.
        "UPDATE features SET vector = (SELECT vector FROM features ORDER BY key LIMIT 1)",
    ],
)
def test_damaged_entries_are_computed_anew_and_repaired(encoder, encoded, tmp_path, caplog, damage):
    good = FeatureStore(tmp_path).encode(encoder, TEXTS)
    alter(only_file(tmp_path), damage)
    healed = FeatureStore(tmp_path).encode(encoder, TEXTS)
    torch.testing.assert_close(healed, good)
    (warning,) = warnings_of(caplog)
    assert "damaged entries" in warning
    assert len(encoded) == 2
    assert torch.equal(FeatureStore(tmp_path).encode(encoder, TEXTS), healed)
    assert len(encoded) == 2


def test_a_single_flipped_bit_in_a_vector_is_noticed(encoder, tmp_path, caplog):
    good = FeatureStore(tmp_path).encode(encoder, TEXTS)
    path = only_file(tmp_path)
    content = bytearray(path.read_bytes())
    place = content.find(good[1].numpy().tobytes())
    assert place > 0
    content[place + 17] ^= 1
    path.write_bytes(content)
    torch.testing.assert_close(FeatureStore(tmp_path).encode(encoder, TEXTS), good)
    assert "1 damaged entries" in warnings_of(caplog)[0]


@pytest.mark.parametrize("content", [b"no database " * 200, b"\0" * 5000, bytes(range(256)) * 40])
def test_a_file_that_is_no_database_is_replaced(encoder, encoded, tmp_path, caplog, content):
    good = FeatureStore(tmp_path).encode(encoder, TEXTS)
    only_file(tmp_path).write_bytes(content)
    assert torch.equal(FeatureStore(tmp_path).encode(encoder, TEXTS), good)
    (warning,) = warnings_of(caplog)
    assert "cannot be read" in warning
    assert torch.equal(FeatureStore(tmp_path).encode(encoder, TEXTS), good)
    assert len(encoded) == 2  # the replaced file is a working cache again


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_database_gives_right_vectors(encoder, tmp_path, caplog, share):
    texts = [f"text {number}" for number in range(200)]
    good = FeatureStore(tmp_path).encode(encoder, texts)
    path = only_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    torch.testing.assert_close(FeatureStore(tmp_path).encode(encoder, texts), good)
    assert warnings_of(caplog)
    torch.testing.assert_close(FeatureStore(tmp_path).encode(encoder, texts), good)


def test_garbage_in_the_middle_of_a_database_gives_right_vectors(encoder, tmp_path, caplog):
    texts = [f"text {number}" for number in range(200)]
    good = FeatureStore(tmp_path).encode(encoder, texts)
    path = only_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[4096:12288] = np.random.default_rng(0).bytes(8192)
    path.write_bytes(content)
    torch.testing.assert_close(FeatureStore(tmp_path).encode(encoder, texts), good)
    assert warnings_of(caplog)


def test_an_empty_file_as_a_kill_leaves_it_is_filled_without_a_word(encoder, encoded, tmp_path, caplog):
    FeatureStore(tmp_path).encode(encoder, TEXTS)
    only_file(tmp_path).write_bytes(b"")
    FeatureStore(tmp_path).encode(encoder, TEXTS)
    FeatureStore(tmp_path).encode(encoder, TEXTS)
    assert len(encoded) == 2
    assert warnings_of(caplog) == []


def test_a_table_of_another_form_is_let_alone(encoder, tmp_path, caplog):
    good = FeatureStore(tmp_path).encode(encoder, TEXTS)
    alter(only_file(tmp_path), "ALTER TABLE features RENAME COLUMN vector TO numbers")
    torch.testing.assert_close(FeatureStore(tmp_path).encode(encoder, TEXTS), good)
    (warning,) = warnings_of(caplog)
    assert "cannot be read" in warning


@pytest.mark.parametrize("warm", [False, True])
def test_a_locked_cache_is_a_warning_and_waited_for_once(encoder, encoded, tmp_path, caplog, monkeypatch, warm):
    monkeypatch.setattr(features, "_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(features, "_CHUNK", 1)
    good = FeatureStore().encode(encoder, TEXTS)
    FeatureStore(tmp_path).encode(encoder, TEXTS if warm else ["another"])
    with closing(sqlite3.connect(only_file(tmp_path))) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert torch.equal(FeatureStore(tmp_path).encode(encoder, TEXTS), good)
    (warning,) = warnings_of(caplog)
    assert "locked" in warning
    encoded.clear()
    assert torch.equal(FeatureStore(tmp_path).encode(encoder, TEXTS), good)
    assert bool(encoded) != warm  # the lock's holder lost nothing


def test_a_cache_locked_for_writing_is_still_read(encoder, encoded, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(features, "_WAIT_SECONDS", 0.01)
    good = FeatureStore(tmp_path).encode(encoder, TEXTS)
    encoded.clear()
    with closing(sqlite3.connect(only_file(tmp_path))) as other:
        other.execute("BEGIN IMMEDIATE")
        assert torch.equal(FeatureStore(tmp_path).encode(encoder, TEXTS), good)
        assert encoded == []
        assert warnings_of(caplog) == []
        FeatureStore(tmp_path).encode(encoder, ["new"])
    assert "cannot be written" in warnings_of(caplog)[0]


def test_a_read_only_cache_is_read_and_not_written(encoder, encoded, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(features, "_CHUNK", 1)
    store = FeatureStore(tmp_path)
    good = store.encode(encoder, TEXTS)
    path = only_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[18] = 3  # "write version" of the file format: SQLite must not write what is above 2, not even as root
    path.write_bytes(content)
    encoded.clear()
    assert torch.equal(store.encode(encoder, TEXTS), good)
    assert encoded == []
    torch.testing.assert_close(store.encode(encoder, ["new", "newer", "d"])[2], good[4])
    (warning,) = warnings_of(caplog)
    assert "readonly" in warning
    assert path.read_bytes() == content


@pytest.mark.parametrize("where", ["file", "file/below", "cache"])
def test_a_place_where_no_cache_can_be_made_is_a_warning(encoder, tmp_path, caplog, where):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / where
    if where == "cache":  # a folder stands where the file should be
        (folder / f"features-{encoder.key()[:32]}.sqlite").mkdir(parents=True)
    vectors = FeatureStore(folder).encode(encoder, TEXTS)
    assert torch.equal(vectors, FeatureStore().encode(encoder, TEXTS))
    (warning,) = warnings_of(caplog)
    assert "feature cache cannot be" in warning


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_a_warning(encoder, tmp_path, caplog):
    tmp_path.chmod(0o500)
    try:
        FeatureStore(tmp_path).encode(encoder, TEXTS)
    finally:
        tmp_path.chmod(0o700)
    assert "cannot be written" in warnings_of(caplog)[0]


def test_a_damaged_file_that_cannot_be_removed_is_let_alone(encoder, tmp_path, caplog, monkeypatch):
    good = FeatureStore(tmp_path).encode(encoder, TEXTS)
    only_file(tmp_path).write_bytes(b"no database " * 200)

    def refuse(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert torch.equal(FeatureStore(tmp_path).encode(encoder, TEXTS), good)
    assert any("cannot be removed" in warning for warning in warnings_of(caplog))


def test_the_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("CARAVAN_CACHE")
    assert default_cache().name == "caravan"
