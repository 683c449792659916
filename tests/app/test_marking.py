"""Marks over HTTP: who may make, read and take them back, what is refused, and a disk that is full."""

from pathlib import Path

import pytest

from caravan.app.feedback.marks import RIGHT, Marks, weights_name
from caravan.app.web import bodies
from caravan.storage import load
from served import BELL, HERE, KEYS, READER, WRITER, refusal, serving

RIGHT_MARK = {"query": "where is my parcel", "doc_id": "parcel", "right": True}
WRONG_MARK = {"query": "where is my parcel", "doc_id": "money", "right": False}


def _count(response) -> int:
    assert response.status_code == 200, response.text
    return bodies.MarksCountAnswer.model_validate_json(response.text, strict=True).marks


def _marks(client, **options) -> bodies.MarksAnswer:
    response = client.get("/marks", **options)
    assert response.status_code == 200, response.text
    return bodies.MarksAnswer.model_validate_json(response.text, strict=True)


def test_marks_are_made_read_counted_and_taken_back(folder: Path) -> None:
    with serving(folder) as client:
        assert client.get("/info").json()["marks"] == 0
        assert _count(client.post("/marks", json=RIGHT_MARK)) == 1
        assert _count(client.post("/marks", json=WRONG_MARK)) == 2
        assert client.get("/info").json()["marks"] == 2
        found = _marks(client)
        assert [(mark.doc_id, mark.right) for mark in found.marks] == [("money", False), ("parcel", True)]
        assert found.total == 2
        assert found.marks[0].model == weights_name(load(folder))
        assert found.marks[0].time > found.marks[1].time
        newest = _marks(client, params={"limit": 1})
        assert ([mark.doc_id for mark in newest.marks], newest.total) == (["money"], 2)
        answer = client.delete("/marks", params={"query": "where is my parcel", "doc_id": "money"})
        assert _count(answer) == 1
        refusal(client.delete("/marks", params={"query": "where is my parcel", "doc_id": "money"}), 404)
    assert [mark.doc_id for mark in Marks(folder).read().marks] == ["parcel"]


def test_marks_survive_documents_that_come_and_go_and_name_the_weights_they_are_about(folder: Path) -> None:
    with serving(folder) as client:
        client.post("/marks", json=RIGHT_MARK)
        assert client.post("/documents", json={"documents": [BELL]}).status_code == 200
        client.post("/marks", json={"query": "ring", "doc_id": "bell", "right": True})
        assert client.delete("/documents", params={"doc_id": "parcel"}).status_code == 200
        found = _marks(client)
        assert [mark.doc_id for mark in found.marks] == ["bell", "parcel"]
        assert found.marks[0].model != found.marks[1].model
        assert client.get("/info").json()["marks"] == 2


def test_what_is_no_mark_is_refused_and_nothing_is_kept(folder: Path) -> None:
    with serving(folder, limits={"max_characters": 20}) as client:
        assert "'nobody'" in refusal(client.post("/marks", json={**RIGHT_MARK, "doc_id": "nobody"}), 404)
        assert "at most 20" in refusal(client.post("/marks", json={**RIGHT_MARK, "query": "x" * 21}), 413)
        refusal(client.post("/marks", json={**RIGHT_MARK, "query": "a\x00b"}), 400)
        for body in ({**RIGHT_MARK, "query": ""}, {**RIGHT_MARK, "right": "yes"}, {**RIGHT_MARK, "more": 1}, []):
            refusal(client.post("/marks", json=body), 422)
        refusal(client.get("/marks", params={"limit": 0}), 422)
        refusal(client.delete("/marks"), 422)
    assert not Marks(folder).folder.exists()


def test_marking_needs_the_write_right_and_reading_marks_the_read_right(folder: Path) -> None:
    with serving(folder, keys=KEYS) as client:
        refusal(client.post("/marks", json=RIGHT_MARK), 401)
        refusal(client.post("/marks", json=RIGHT_MARK, headers=READER), 403)
        refusal(client.get("/marks"), 401)
        assert _count(client.post("/marks", json=RIGHT_MARK, headers=WRITER)) == 1
        assert _marks(client, headers=READER).total == 1
        refusal(client.delete("/marks", params={"query": "a", "doc_id": "b"}, headers=READER), 403)
    with serving(folder, keys=HERE, mips=False) as client:  # --local-changes
        assert client.post("/marks", json=WRONG_MARK).status_code == 200


def test_another_machine_may_not_mark_where_only_local_changes_are_allowed(folder: Path) -> None:
    from served import client_of, make

    with client_of(make(folder), peer="10.0.0.7") as client:
        refusal(client.post("/marks", json=RIGHT_MARK), 403)


def test_a_disk_that_takes_nothing_is_a_503_that_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serving(folder) as client:
        client.post("/marks", json=RIGHT_MARK)
        before = (Marks(folder).folder / RIGHT).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("caravan.app.feedback.marks.os.pwrite", full)
            response = client.post("/marks", json={**RIGHT_MARK, "query": "refund"})
            assert "No space left" in refusal(response, 503)
            assert int(response.headers["retry-after"]) > 0
        assert _marks(client).total == 1
        assert (Marks(folder).folder / RIGHT).read_bytes() == before
        assert _count(client.post("/marks", json={**RIGHT_MARK, "query": "refund"})) == 2


def test_marks_that_cannot_be_read_stop_neither_search_nor_info(folder: Path) -> None:
    Marks(folder).folder.mkdir()
    (Marks(folder).folder / RIGHT).mkdir()  # a folder where a file should be
    with serving(folder) as client:
        assert client.get("/info").json()["marks"] == 0
        refusal(client.get("/marks"), 503)
        assert client.post("/search", json={"query": "refund"}).status_code == 200


def test_queries_that_are_marked_are_not_in_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(folder) as client, caplog.at_level("DEBUG"):
        client.post("/marks", json=RIGHT_MARK)
        client.delete("/marks", params={"query": "where is my parcel", "doc_id": "parcel"})
    ours = [record for record in caplog.records if record.name.startswith("caravan")]
    assert ours
    assert not [record for record in ours if "parcel" in str(record.__dict__)]
