"""Who may be a node: attacks on a running server with real processes and sockets."""

import base64
import http.client
import shutil
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from caravan.app.nodes.deployment import Deployment
from caravan.app.nodes.operation import status
from loopback_network import write_queries
from real_federation import RealFederation, make_folder, real_federation, wait_until
from toy_experiments import DATASET, Place, make_place

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def running(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    """A server for two nodes, of which east works; north is up to the test."""
    root = tmp_path_factory.mktemp("identity")
    config = place.config(mode="head", federation={"rounds": 1})
    folder = make_folder(root / "fed", place, config, ("east", "north"))
    with real_federation(folder) as federation:
        federation.serve()
        federation.join("east", write_queries(root / "east.csv", DATASET, "east"))
        federation.wait_for("east", "SuperNode ID")
        yield federation


@pytest.fixture
def north(running: RealFederation) -> Path:
    """North's queries."""
    return write_queries(running.folder.parent / "north.csv", DATASET, "north")


def other_folder(federation: RealFederation, name: str) -> Path:
    return Path(
        shutil.copytree(federation.folder, federation.folder.parent / name, ignore=shutil.ignore_patterns("flower"))
    )


def refused(federation: RealFederation, folder: Path, data: Path) -> str:
    """Have an impostor of north try to connect, which must not last; what it is told."""
    federation.join("north", data, folder=folder, log="impostor")
    assert federation.end_of("impostor") == 1
    assert "FederationError: node north ended with exit code" in federation.said("impostor")
    assert "SuperNode ID" not in federation.said("impostor")
    return federation.said("impostor")


def test_a_key_that_is_not_registered_is_refused(running, place, tmp_path, north):
    stranger, folder = make_folder(tmp_path / "stranger", place, place.config(), ["north"]), other_folder(running, "a")
    shutil.copy(stranger / "nodes/north.key", folder / "nodes/north.key")
    assert "Failed to initialize the connection" in refused(running, folder, north)


def test_a_server_of_another_authority_is_not_trusted(running, place, tmp_path, north):
    stranger, folder = make_folder(tmp_path / "stranger", place, place.config(), ["north"]), other_folder(running, "b")
    shutil.copy(stranger / "certificates/ca.crt", folder / "certificates/ca.crt")
    assert "CERTIFICATE_VERIFY_FAILED" in refused(running, folder, north)


def test_plaintext_gets_no_connection(running, north):
    folder = other_folder(running, "c")
    settings = folder / "caravan.toml"
    text = settings.read_text(encoding="utf-8").replace("insecure = false", "insecure = true")
    settings.write_text(text, encoding="utf-8")
    running.join("north", north, folder=folder, log="impostor")
    try:
        wait_until(
            lambda: running.said("impostor").count("Connection attempt failed") >= 3,
            lambda: running.said("impostor"),
        )
        assert "SuperNode ID" not in running.said("impostor")
        nodes = status(Deployment.read(running.folder))["nodes"]
        assert sorted(node["status"] for node in nodes) == ["online", "registered"]  # east, and north's key
    finally:
        running.stop("impostor")


def test_a_second_process_with_a_nodes_key_is_refused_while_the_first_is_there(running, tmp_path, north):
    running.join("north", north)
    running.wait_for("north", "SuperNode ID")
    try:
        refused(running, other_folder(running, "d"), north)
        assert "could not be activated" in running.said("server")
        assert running.submit(tmp_path / "out") == 0, running.said("submit")
        assert "round 1/1: 2 of 2 nodes" in running.said("submit")
    finally:
        running.stop("north")


def test_a_signature_serves_for_minutes_for_its_own_node_and_for_nothing_that_starts_runs(running):
    """What a node sends of itself is a signed time: an old one and one of another key are refused."""
    deployment = Deployment.read(running.folder)
    key = serialization.load_ssh_private_key(deployment.key("east").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def ask(when: datetime, signer: ec.EllipticCurvePrivateKey) -> int:
        stamp = when.isoformat()
        signature = signer.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        headers = {
            "content-type": "application/protobuf",
            "flwr-public-key": base64.b64encode(public).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }
        context = ssl.create_default_context(cafile=str(deployment.certificate("ca.crt")))
        connection = http.client.HTTPSConnection("127.0.0.1", deployment.config.deployment.port, context=context)
        connection.request("POST", "/v1/fleet/activate-node", body=_activation(public), headers=headers)
        status = connection.getresponse().status
        connection.close()
        return status

    now, stranger = datetime.now(UTC), ec.generate_private_key(ec.SECP384R1())
    assert ask(now - timedelta(hours=1), key) == 401
    assert ask(now + timedelta(hours=1), key) == 401
    assert ask(now, stranger) == 401
    assert ask(now, key) not in (200, 401)  # known, and there already


def _activation(public: bytes) -> bytes:
    from flwr.proto.fleet_pb2 import ActivateNodeRequest

    return ActivateNodeRequest(public_key=public, heartbeat_interval=30).SerializeToString()
