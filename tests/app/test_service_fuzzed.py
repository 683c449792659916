"""Requests that nobody wrote: schemathesis makes well-formed and malformed ones of the service's own description."""

import socket
from pathlib import Path

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks as conformance

from caravan.storage import load
from saved_retrievers import QUERIES
from served import listening, make

load_all_checks()
CHECKS = [
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
    conformance.unsupported_method,
]
FUZZED = 10_000  # of the long form, half of them malformed on purpose


def fuzz(folder: Path, *, count: int, start: int) -> dict[int, int]:
    """Send requests, and check each answer against the description; how many there were by status."""
    app = make(folder, mips=True, limits={"timeout": 20})
    schema = schemathesis.openapi.from_dict(app.openapi()).exclude(path="/training/events")  # it has no end
    strategies = [
        schema.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]
    statuses: dict[int, int] = {}

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(strategies))
    def send(case) -> None:
        response = case.call(base_url=address, session=session, timeout=60)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500 or response.status_code == 503, (response.status_code, response.text)
        assert "Traceback" not in response.text
        case.validate_response(response, checks=CHECKS)

    with listening(app) as address, requests.Session() as session:
        session.trust_env = False
        send()
        assert httpx2.get(f"{address}/health", timeout=60).json() == {"status": "ready"}
        assert httpx2.post(f"{address}/search", json={"query": QUERIES[0]}, timeout=60).status_code == 200
        served = {
            row["doc_id"] for row in httpx2.get(f"{address}/documents?limit=1000", timeout=60).json()["documents"]
        }
    # Nothing lost, nothing half-written: what was served last is what a restart finds.
    assert served == set(load(folder).catalogue.ids)
    assert not [path.name for path in folder.parent.iterdir() if path.name.endswith((".tmp", ".old"))]
    return statuses


def test_no_request_that_the_description_suggests_or_forbids_is_a_fault(folder: Path) -> None:
    statuses = fuzz(folder, count=100, start=0)
    assert {200, 422} <= set(statuses)


@pytest.mark.slow
def test_no_request_of_ten_thousand_is_a_fault(folder: Path) -> None:
    statuses = fuzz(folder, count=FUZZED, start=1)
    assert sum(statuses.values()) >= FUZZED


HEAD = b"POST /search HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "more", "status"),
    [
        (HEAD + b"content-length: 9999999\r\n\r\n", b"", b"413"),  # announced
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"800\r\n" + b" " * 0x800 + b"\r\n", b"413"),  # without end
        (HEAD + b"content-length: 4000\r\n\r\n", b" ", b"408"),  # byte by byte
        (HEAD + b"content-length: 4000\r\n\r\n", b"", b"408"),  # nothing
        (HEAD + b"content-length: -1\r\n\r\n", b"", b"400"),
        (HEAD + b"x: " + b"a" * 200_000 + b"\r\n\r\n", b"", b"4"),
        (b"\x16\x03\x01 this is TLS\r\n\r\n", b"", b"400"),
        (b"GET /%ff%fe?doc_id=%ff HTTP/1.1\r\nhost: a\r\n\r\n", b"", b"404"),
        (b"GET /documents?doc_id=%ff HTTP/1.1\r\nhost: a\r\n\r\n", b"", b"404"),
        (b"DELETE /documents?doc_id=%00&doc_id=%ed%a0%80 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", b"", b"404"),
        (b"GET /training HTTP/1.1\r\nhost: a\r\nauthorization: Bearer \xff\xfe\r\n\r\n", b"", b"200"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"", b"4"),
    ],
)
def test_bodies_that_are_slow_too_large_or_no_http_are_refused_and_others_are_served(
    address: str, sent: bytes, more: bytes, status: bytes
) -> None:
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(sent)
        client.settimeout(0.02 if more else 20)
        answer = b""
        while b"\r\n\r\n" not in answer:
            try:
                if not (part := client.recv(4096)):
                    break
                answer += part
            except TimeoutError:
                client.sendall(more)
    assert answer.startswith(b"HTTP/1.1 " + status), answer
    assert httpx2.post(f"{address}/search", json={"query": QUERIES[0]}, timeout=20).status_code == 200


@pytest.fixture(scope="module")
def address(master: Path):
    with listening(make(master, limits={"max_body_bytes": 5000, "body_timeout": 0.3})) as found:
        yield found


def test_a_client_that_breaks_off_in_the_middle_of_a_body_disturbs_nobody(address: str) -> None:
    port = int(address.rpartition(":")[2])
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(HEAD + b'content-length: 4000\r\n\r\n{"query": ')
    assert httpx2.get(f"{address}/health", timeout=20).json() == {"status": "ready"}
