"""Documents and models that change while they are served."""

import logging
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from caravan.app.web import bodies
from caravan.config import BackboneConfig
from caravan.model.backbone import Backbone, load_backbone
from caravan.storage import load, save
from saved_retrievers import DOCUMENTS, change_tensors, files_of, make_retriever
from served import BELL, refusal, serving
from tiny_models import make_tiny_bert


@pytest.fixture(scope="module")
def asked(master: Path):
    with serving(master) as client:
        yield client


class TestDocuments:
    def test_they_can_be_read_page_by_page_and_by_id(self, asked: TestClient) -> None:
        page = asked.get("/documents", params={"offset": 1, "limit": 1}).json()
        bodies.DocumentsAnswer.model_validate(page)
        assert ([row["doc_id"] for row in page["documents"]], page["total"]) == (["login"], 3)
        found = asked.get("/documents", params={"doc_id": ["money", "parcel"]}).json()["documents"]
        assert [row["doc_id"] for row in found] == ["money", "parcel"]
        assert found[1]["metadata"] == {"url": "https://example.org/1"}
        refusal(asked.get("/documents", params={"doc_id": "nobody"}), 404)
        refusal(asked.get("/documents", params={"offset": -1}), 422)

    def test_an_added_document_is_found_at_once_and_after_a_restart(self, folder: Path) -> None:
        before = load(folder)
        with serving(folder, mips=True) as client:
            answer = client.post("/documents", json={"documents": [BELL]}).json()
            change = bodies.ChangeAnswer.model_validate(answer)
            assert (change.added, change.documents) == (["bell"], 4)
            query = {"query": f"{BELL['title']}. {BELL['text']}", "k": 4, "mips": True}
            (result,) = client.post("/search", json=query).json()["results"]
        assert result["mips"][0]["doc_id"] == "bell"
        assert "bell" in {hit["doc_id"] for hit in result["hits"]}
        after = load(folder)
        assert after.catalogue.document(3).metadata == {"topic": "parts"}
        assert torch.equal(after.head.rows[:3], before.head.rows)
        assert after.record["changes"] == {"added": 1, "replaced": 0, "removed": 0}
        (hits,) = after.search([query["query"]], k=4)
        assert [hit.doc_id for hit in hits] == [hit["doc_id"] for hit in result["hits"]]

    def test_adding_the_same_again_changes_nothing_and_another_text_needs_replace(self, folder: Path) -> None:
        with serving(folder) as client:
            client.post("/documents", json={"documents": [BELL]})
            files = files_of(folder)
            answer = client.post("/documents", json={"documents": [BELL]}).json()
            assert (answer["added"], answer["unchanged"]) == ([], ["bell"])
            other = {"documents": [{**BELL, "text": "another"}]}
            assert "replace" in refusal(client.post("/documents", json=other), 409)
            assert files_of(folder) == files
            row = load(folder).head.rows[3]
            assert client.post("/documents", json={**other, "replace": True}).json()["replaced"] == ["bell"]
        after = load(folder)
        assert after.catalogue.document(3).text == "another"
        assert torch.equal(after.head.rows[3], row)

    def test_a_removed_document_is_gone_at_once_and_after_a_restart(self, folder: Path) -> None:
        before = load(folder)
        with serving(folder, mips=True) as client:
            answer = client.delete("/documents", params={"doc_id": "login"}).json()
            assert (answer["removed"], answer["documents"]) == (["login"], 2)
            (result,) = client.post("/search", json={"query": "refund", "mips": True}).json()["results"]
        assert {hit["doc_id"] for hit in result["hits"]} == {"parcel", "money"}
        assert {hit["doc_id"] for hit in result["mips"]} == {"parcel", "money"}
        after = load(folder)
        assert torch.equal(after.head.rows, before.head.rows[[0, 2]])

    def test_changes_that_cannot_be_made_are_refused_and_nothing_changes(self, folder: Path) -> None:
        files = files_of(folder)
        with serving(folder, limits={"max_documents": 2, "max_characters": 50}) as client:
            refusal(client.delete("/documents", params={"doc_id": ["login", "nobody"]}), 404)
            refusal(client.delete("/documents"), 422)
            refusal(client.delete("/documents", params={"doc_id": ["login", "parcel", "money"]}), 409)
            for documents, status in (
                ([], 422),
                ([{"doc_id": "a"}], 422),
                ([{"doc_id": "a", "text": " "}], 400),
                ([{"doc_id": "a", "text": "a\0"}], 400),
                ([{"doc_id": " ", "text": "a"}], 400),
                ([{"doc_id": "a", "text": "a"}, {"doc_id": "a", "text": "b"}], 400),
                ([{"doc_id": "a", "text": "a" * 51}], 413),
                ([{"doc_id": name, "text": "a"} for name in "abc"], 413),
                ([{"doc_id": "a", "text": "a", "colour": "red"}], 422),
            ):
                refusal(client.post("/documents", json={"documents": documents}), status)
        assert files_of(folder) == files

    def test_a_change_that_cannot_be_saved_is_a_503_and_the_old_state_stays(self, folder: Path, monkeypatch) -> None:
        files = files_of(folder)
        with serving(folder) as client:
            with monkeypatch.context() as patch:
                patch.setattr("caravan.files.os.fsync", _full)
                assert "No space left" in refusal(client.post("/documents", json={"documents": [BELL]}), 503)
                assert "No space left" in refusal(client.delete("/documents", params={"doc_id": "login"}), 503)
            assert files_of(folder) == files
            assert client.get("/info").json()["documents"] == 3
            assert client.post("/documents", json={"documents": [BELL]}).json()["documents"] == 4

    def test_two_services_on_one_folder_lose_none_of_each_others_changes(self, folder: Path) -> None:
        with serving(folder) as one, serving(folder) as two:
            one.post("/documents", json={"documents": [{"doc_id": "a", "text": "first"}]})
            answer = two.post("/documents", json={"documents": [{"doc_id": "b", "text": "second"}]}).json()
        assert answer["documents"] == 5
        assert load(folder).catalogue.ids[3:] == ("a", "b")


def _full(_: object) -> None:
    raise OSError(28, "No space left on device")


class TestReload:
    def test_a_new_model_in_the_folder_is_served_on_demand(self, folder: Path, bert: Backbone) -> None:
        with serving(folder) as client:
            save(make_retriever(bert, DOCUMENTS[:2], seed=3), folder)
            assert client.get("/info").json()["documents"] == 3
            assert client.post("/reload").json()["documents"] == 2
            (result,) = client.post("/search", json={"query": "refund"}).json()["results"]
        assert [hit["doc_id"] for hit in result["hits"]] == [hit.doc_id for hit in load(folder).search("refund")]

    def test_a_model_on_another_backbone_is_served_too(self, folder: Path, tmp_path: Path) -> None:
        other = load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path / "other", seed=5))))
        with serving(folder, mips=True) as client:
            save(make_retriever(other), folder)
            assert client.post("/reload").json()["model_sha"] == other.hash
            assert client.post("/search", json={"query": "refund", "mips": True}).status_code == 200

    def test_a_damaged_model_is_refused_and_the_old_one_stays(self, folder: Path) -> None:
        with serving(folder) as client:
            before = client.post("/search", json={"query": "refund"}).json()
            change_tensors(folder, "head.safetensors", lambda state: state["rows"].fill_(float("nan")))
            assert "not finite" in refusal(client.post("/reload"), 409)
            assert client.post("/search", json={"query": "refund"}).json() == before
            assert client.get("/health").status_code == 200
            refusal(client.post("/documents", json={"documents": [BELL]}), 503)

    def test_a_watched_folder_is_reloaded_by_itself_and_a_damaged_one_told_once(
        self, folder: Path, tmp_path: Path, bert: Backbone, caplog
    ) -> None:
        caplog.set_level(logging.INFO, "caravan.service")
        with serving(folder, watch=0.01) as client:
            save(make_retriever(bert, DOCUMENTS[:2], seed=3), folder)
            _until(lambda: client.get("/info").json()["documents"] == 2)
            (tmp_path / "damaged").write_bytes(b"no")
            (tmp_path / "damaged").replace(folder / "head.safetensors")
            _until(lambda: client.get("/health") and "reload refused" in [line.getMessage() for line in caplog.records])
            for _ in range(20):
                assert client.get("/info").json()["documents"] == 2
        assert [record.getMessage() for record in caplog.records].count("reload refused") == 1


def _until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
    raise AssertionError("it never came")
