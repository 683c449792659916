"""`caravan serve` as its clients meet it."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from caravan.app.web import bodies
from caravan.errors import StorageError
from caravan.model.backbone import Backbone
from caravan.model.encoder import Encoder
from caravan.storage import load
from saved_retrievers import DOCUMENTS, QUERIES
from served import BELL, KEYS, READER, WRITER, client_of, make, refusal, serving


@pytest.fixture(scope="module")
def asked(master):
    with serving(master, mips=True, limits={"max_body_bytes": 5000, "max_texts": 4, "max_k": 50}) as client:
        yield client


class TestSearch:
    def test_hits_are_those_of_the_retriever(self, asked: TestClient, master: Path) -> None:
        results = asked.post("/search", json={"query": QUERIES, "k": 2}).json()["results"]
        for got, wanted in zip(results, load(master).search(QUERIES, k=2), strict=True):
            assert [hit["doc_id"] for hit in got["hits"]] == [hit.doc_id for hit in wanted]
            assert [hit["rank"] for hit in got["hits"]] == [1, 2]
            for mine, own in zip(got["hits"], wanted, strict=True):
                assert mine["score"] == pytest.approx(own.score, rel=1e-5)
                assert mine["probability"] == pytest.approx(own.probability, rel=1e-5)
                assert (mine["title"], mine["text"]) == (own.title, own.text)

    def test_the_answer_is_what_the_description_says(self, asked: TestClient) -> None:
        answer = asked.post("/search", json={"query": "refund", "mips": True}).text
        (result,) = bodies.SearchAnswer.model_validate_json(answer, strict=True).results
        assert len(result.hits) == len(result.mips or ()) == len(DOCUMENTS)
        assert sum(hit.probability for hit in result.hits) == pytest.approx(1)

    def test_texts_can_be_left_out(self, asked: TestClient) -> None:
        (result,) = asked.post("/search", json={"query": "refund", "texts": False}).json()["results"]
        assert {"text", "metadata"}.isdisjoint(result["hits"][0])

    def test_a_filter_leaves_documents_with_that_metadata_and_keeps_their_probabilities(self, asked) -> None:
        (everything,) = asked.post("/search", json={"query": "refund"}).json()["results"]
        body = {"query": "refund", "filter": {"url": ["https://example.org/1", "elsewhere"]}, "mips": True}
        (result,) = asked.post("/search", json=body).json()["results"]
        assert [hit["doc_id"] for hit in result["hits"]] == ["parcel"]
        assert [hit["doc_id"] for hit in result["mips"]] == ["parcel"]
        (before,) = (hit for hit in everything["hits"] if hit["doc_id"] == "parcel")
        assert result["hits"][0]["probability"] == pytest.approx(before["probability"])
        none = asked.post("/search", json={"query": "refund", "filter": {"url": "elsewhere"}}).json()
        assert none == {"results": [{"hits": []}]}

    def test_mips_is_the_bare_models_inner_product(self, asked: TestClient, bert: Backbone, master: Path) -> None:
        from caravan.model.adapter import IdentityAdapter

        encoder = Encoder(bert, IdentityAdapter(bert.embedding_width))
        products = encoder.encode(["refund"]) @ encoder.encode([document.content for document in DOCUMENTS]).T
        order = products[0].argsort(descending=True).tolist()
        (result,) = asked.post("/search", json={"query": "refund", "k": 3, "mips": True}).json()["results"]
        assert [hit["doc_id"] for hit in result["mips"]] == [DOCUMENTS[row].doc_id for row in order]
        scores = torch.tensor([hit["score"] for hit in result["mips"]])
        assert torch.allclose(scores, products[0][order], atol=1e-5)

    def test_mips_that_was_not_asked_for_at_the_start_is_refused(self, master: Path) -> None:
        with serving(master) as client:
            assert "--mips" in refusal(client.post("/search", json={"query": "refund", "mips": True}), 400)


class TestByWords:
    def test_documents_that_share_words_are_ranked_as_by_the_baseline(self, asked: TestClient) -> None:
        from caravan.training.baselines import bm25

        texts = [document.content for document in DOCUMENTS]
        ranking = bm25(["track the refund", "parcel"], texts)
        results = asked.post("/search", json={"query": ["track the refund", "parcel"], "bm25": True}).json()["results"]
        for number, result in enumerate(results):
            bodies.ResultAnswer.model_validate(result)
            wanted = [
                (DOCUMENTS[row].doc_id, pytest.approx(score))
                for row, score in zip(ranking.rows[number].tolist(), ranking.scores[number].tolist(), strict=True)
                if score > 0
            ]
            assert [(row["doc_id"], row["score"]) for row in result["bm25"]] == wanted
        assert [row["doc_id"] for row in results[1]["bm25"]] == ["parcel"]

    def test_without_a_shared_word_nothing_is_found_and_a_filter_holds(self, asked: TestClient) -> None:
        (nothing,) = asked.post("/search", json={"query": "zebra", "bm25": True}).json()["results"]
        assert nothing["bm25"] == []
        body = {"query": "track a refund", "bm25": True, "filter": {"url": "https://example.org/1"}}
        (result,) = asked.post("/search", json=body).json()["results"]
        assert [(row["rank"], row["doc_id"], row["title"]) for row in result["bm25"]] == [(1, "parcel", "Tracking")]

    def test_a_document_that_was_added_is_found_by_its_words_at_once(self, folder: Path) -> None:
        body = {"query": "ring to the left", "bm25": True}
        with serving(folder) as client:
            assert client.post("/search", json=body).json()["results"][0]["bm25"] == []
            client.post("/documents", json={"documents": [BELL]})
            (found,) = client.post("/search", json=body).json()["results"][0]["bm25"]
        assert found["doc_id"] == "bell"


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"query": ""}, 422, "at least 1 character"),
        ({"query": "  "}, 400, "is empty"),
        ({"query": []}, 422, "at least 1 item"),
        ({"query": ["ok", ""]}, 422, "at least 1 character"),
        ({"query": "ok", "k": 0}, 422, "greater than or equal to 1"),
        ({"query": "ok", "k": 51}, 422, "at most 50"),
        ({"query": "ok", "k": "3"}, 422, "valid integer"),
        ({"query": "ok", "k": 10**40}, 422, ""),
        ({"query": 7}, 422, "valid string"),
        ({"question": "ok"}, 422, "query"),
        ({"query": "ok", "filter": {"colour": "red"}}, 400, "no document has metadata"),
        ({"query": ["ok"] * 5}, 413, "at most 4"),
        ({"query": "ok" * 3000}, 413, "bytes"),
        ([], 422, "dictionary"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_in_one_line(asked: TestClient, body, status: int, word: str) -> None:
    assert word in refusal(asked.post("/search", json=body), status)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"query": ', 422),
        (b"", 422),
        (b"\xff\xfe", 422),
        (b'{"query": "\\ud800"}', 422),
        (b'{"query": "ok", "k": NaN}', 422),
        (b"[" * 4000, 400),
        (b'{"query": "ok", "k": ' + b"9" * 4400 + b"}", 400),
    ],
)
def test_a_malformed_body_is_refused_in_one_line(asked: TestClient, content: bytes, status: int) -> None:
    refusal(asked.post("/search", content=content, headers={"content-type": "application/json"}), status)


def test_a_body_without_an_announced_length_is_measured_too(asked: TestClient) -> None:
    parts = (b" " * 1000 for _ in range(6))
    assert "5,000 bytes" in refusal(asked.post("/search", content=parts), 413)


@pytest.mark.parametrize(("method", "path"), [("GET", "/nothing"), ("PUT", "/search"), ("GET", "/docs")])
def test_what_is_not_there_is_told_in_one_line(asked: TestClient, method: str, path: str) -> None:
    refusal(asked.request(method, path), 405 if method == "PUT" else 404)


class TestTextEmbeddingsInference:
    def test_embed_gives_the_encoders_vectors(self, asked: TestClient, master: Path) -> None:
        vectors = torch.tensor(asked.post("/embed", json={"inputs": QUERIES}).json())
        assert torch.allclose(vectors, load(master).encoder.encode(QUERIES), atol=1e-5)
        assert torch.allclose(torch.tensor(asked.post("/embed", json={"inputs": QUERIES[0]}).json()), vectors[:1])

    def test_a_text_that_would_be_cut_is_refused_on_demand(self, asked: TestClient) -> None:
        long = "word " * 100
        assert asked.post("/embed", json={"inputs": long}).status_code == 200
        assert "truncate" in refusal(asked.post("/embed", json={"inputs": long, "truncate": False}), 400)
        assert asked.post("/embed", json={"inputs": "short", "truncate": False}).status_code == 200

    def test_a_document_is_reranked_by_its_trained_row(self, asked: TestClient, master: Path) -> None:
        hits = load(master).search("refund", k=3)
        texts = [document.content for document in DOCUMENTS]
        ranks = asked.post("/rerank", json={"query": "refund", "texts": texts, "raw_scores": True}).json()
        assert [DOCUMENTS[rank["index"]].doc_id for rank in ranks] == [hit.doc_id for hit in hits]
        assert [rank["score"] for rank in ranks] == pytest.approx([hit.score for hit in hits], rel=1e-4)

    def test_any_text_is_reranked_as_it_would_be_found_once_added(self, folder: Path) -> None:
        body = {"query": "refund", "texts": [BELL["title"] + ". " + BELL["text"]], "raw_scores": True}
        with serving(folder) as client:
            (rank,) = client.post("/rerank", json=body).json()
            assert client.post("/documents", json={"documents": [BELL]}).status_code == 200
            (result,) = client.post("/search", json={"query": "refund"}).json()["results"]
        (hit,) = (hit for hit in result["hits"] if hit["doc_id"] == "bell")
        assert rank["score"] == pytest.approx(hit["score"], rel=1e-4)

    def test_shares_of_reranked_texts_sum_to_one_and_texts_come_back_on_demand(self, asked: TestClient) -> None:
        answer = asked.post("/rerank", json={"query": "a", "texts": ["b", "c", "b"], "return_text": True}).json()
        ranks = TypeAdapter(list[bodies.RankAnswer]).validate_python(answer)
        assert sum(rank.score for rank in ranks) == pytest.approx(1)
        assert [("b", "c", "b")[rank.index] for rank in ranks] == [rank.text for rank in ranks]

    def test_info_says_what_is_served(self, asked: TestClient, master: Path, bert: Backbone) -> None:
        info = bodies.InfoAnswer.model_validate(asked.get("/info").json())
        assert (info.model_id, info.model_sha, info.documents) == ("saved", bert.hash, 3)
        assert info.documents_sha == load(master).catalogue.fingerprint
        assert str(master.parent) not in asked.get("/info").text


class TestKeys:
    def test_without_a_key_only_health_answers(self, master: Path) -> None:
        with serving(master, keys=KEYS) as client:
            for path in ("/health", "/health/live", "/health/ready"):
                assert client.get(path).status_code == 200
            for method, path in (("POST", "/search"), ("GET", "/documents"), ("GET", "/info"), ("GET", "/metrics")):
                response = client.request(method, path, json={"query": "a"} if method == "POST" else None)
                assert "Bearer" in refusal(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
            wrong = {"Authorization": "Bearer wrong-key-of-16-characters"}
            refusal(client.get("/info", headers=wrong), 401)

    def test_a_read_key_reads_and_a_write_key_does_both(self, folder: Path) -> None:
        with serving(folder, keys=KEYS) as client:
            assert client.post("/search", json={"query": "a"}, headers=READER).status_code == 200
            assert "write key" in refusal(client.post("/documents", json={"documents": [BELL]}, headers=READER), 403)
            refusal(client.post("/reload", headers=READER), 403)
            refusal(client.delete("/documents", params={"doc_id": "login"}), 401)
            assert client.post("/documents", json={"documents": [BELL]}, headers=WRITER).status_code == 200
            assert client.get("/documents", headers=WRITER).json()["total"] == 4

    def test_without_a_write_key_documents_change_from_loopback_alone_and_only_if_asked(self, folder: Path) -> None:
        body = {"documents": [BELL]}
        from caravan.app.web.access import Keys

        with serving(folder, keys=Keys()) as client:
            assert "write key" in refusal(client.post("/documents", json=body), 403)
        app = make(folder)
        with client_of(app, peer="192.0.2.7") as client:
            refusal(client.post("/documents", json=body), 403)
        with client_of(make(folder), host="rebound.example.org") as client:
            refusal(client.post("/documents", json=body), 403)
        with client_of(make(folder)) as client:
            refusal(client.post("/documents", json=body, headers={"Origin": "https://evil.example.org"}), 403)
            own = {"Origin": "http://127.0.0.1:8000"}
            assert client.post("/documents", json=body, headers=own).status_code == 200


def test_no_browser_of_another_origin_may_ask_unless_it_was_named(master: Path) -> None:
    origin = {"Origin": "https://shop.example.org"}
    with serving(master) as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
    with serving(master, origins=("https://shop.example.org",)) as client:
        allowed = client.get("/health", headers=origin).headers
        assert allowed["access-control-allow-origin"] == "https://shop.example.org"
        assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": "https://x.org"}).headers


class TestLog:
    SECRET = "xyzzy-nobody-may-read-this"

    def lines(self, caplog) -> list[dict]:
        from caravan.app.web.gate import JsonLines

        return [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "caravan.service"]

    def test_a_line_a_request_says_how_it_went_and_nothing_that_was_asked(self, master: Path, caplog) -> None:
        caplog.set_level(logging.DEBUG)
        with serving(master) as client:
            response = client.post("/search", json={"query": self.SECRET})
            client.post("/search", json={"query": self.SECRET, "k": self.SECRET})
            client.post("/search", json={"query": "a", "filter": {self.SECRET: "b"}})
            client.get(f"/{self.SECRET}", params={"q": self.SECRET})
            client.get("/documents", params={"doc_id": self.SECRET})
            client.request(self.SECRET, "/search")
        lines = self.lines(caplog)
        own = [
            record.getMessage() for record in caplog.records if not record.name.startswith("httpx")
        ]  # the test's own client
        assert self.SECRET not in json.dumps([lines, own]).lower()
        assert [line["status"] for line in lines] == [200, 422, 400, 404, 404, 405]
        assert lines[0]["route"] == "/search"
        assert (lines[0]["texts"], lines[0]["batch"]) == (1, 1)
        assert lines[0]["request"] == response.headers["x-request-id"]
        assert lines[3]["route"] == "unmatched"

    def test_queries_are_logged_on_demand(self, master: Path, caplog) -> None:
        caplog.set_level(logging.INFO, "caravan.service")
        with serving(master, log_texts=True) as client:
            client.post("/search", json={"query": self.SECRET})
        assert self.lines(caplog)[0]["asked"] == [self.SECRET]

    def test_a_fault_of_ours_is_a_500_whose_place_is_logged_but_not_its_message(
        self, master: Path, caplog, monkeypatch
    ) -> None:
        def fail(self, batch):
            raise KeyError(batch[0].texts[0])

        monkeypatch.setattr("caravan.app.web.serving.Served.answer", fail)
        with serving(master) as client:
            refusal(client.post("/search", json={"query": self.SECRET}), 500)
        (line,) = self.lines(caplog)
        assert (line["error"], line["level"]) == ("KeyError", "error")
        assert any(frame.endswith(" fail") for frame in line["frames"])
        assert self.SECRET not in json.dumps(line)


def test_metrics_count_requests_batches_and_documents(folder: Path) -> None:
    with serving(folder) as client:
        client.post("/search", json={"query": QUERIES})
        client.post("/search", json={"query": ""})
        client.post("/documents", json={"documents": [BELL]})
        text = client.get("/metrics").text
    assert 'caravan_requests_total{method="POST",route="/search",status="200"} 1.0' in text
    assert 'caravan_requests_total{method="POST",route="/search",status="422"} 1.0' in text
    assert "caravan_batch_size_sum 3.0" in text
    assert "caravan_batch_size_count 1.0" in text
    assert "caravan_documents 4.0" in text
    assert "caravan_waiting_texts 0.0" in text
    for name in ("request_seconds", "queue_seconds", "inference_seconds"):
        assert re.search(rf"^caravan_{name}_count(\{{.*\}})? [1-9]", text, flags=re.MULTILINE), name


def test_the_description_has_every_route_and_examples_that_are_answered(folder: Path) -> None:
    with serving(folder) as client:
        description = client.get("/openapi.json").json()
        paths = {(method, path) for path, methods in description["paths"].items() for method in methods}
        assert paths == {
            ("post", "/search"), ("get", "/documents"), ("post", "/documents"), ("delete", "/documents"),
            ("post", "/reload"), ("post", "/embed"), ("post", "/rerank"), ("get", "/info"), ("get", "/health"),
            ("get", "/health/ready"), ("get", "/health/live"), ("get", "/metrics"), ("post", "/ask"),
            ("get", "/training"), ("get", "/training/events"),
            ("get", "/marks"), ("post", "/marks"), ("delete", "/marks"),
        }  # fmt: skip
        bodies_of = {"/search": "Search", "/documents": "Documents", "/embed": "Embed", "/rerank": "Rerank"}
        bodies_of |= {"/ask": "Ask", "/marks": "Mark"}
        for path, name in bodies_of.items():
            (example,) = description["components"]["schemas"][f"{name}Body"]["examples"]
            assert client.post(path, json=example).status_code == 200, path


def test_a_folder_that_is_none_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such folder"):
        make(tmp_path / "none")
