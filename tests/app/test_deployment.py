import ipaddress
import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from caravan.app.nodes.deployment import Deployment, init_deployment
from caravan.config import Config, DeploymentConfig, FederationConfig, HeadConfig, config_from_dict
from caravan.data.catalogue import Catalogue
from caravan.errors import CaravanError, ConfigError, DataError, StorageError
from command_line import listing, write_table


@pytest.fixture
def documents(tmp_path: Path) -> str:
    return str(write_table(tmp_path / "documents.csv", ("doc_id", "text"), [("d0", "first"), ("d1", "second")]))


def at(**deployment) -> Config:
    return Config(deployment=DeploymentConfig(**deployment))


def test_a_folder_has_settings_documents_an_app_certificates_and_keys(tmp_path, documents):
    made = init_deployment(tmp_path / "fed", documents, ["oslo", "lima"], at(port=4000))
    assert [name for name, kind in listing(made.folder).items() if kind != "folder"] == [
        "app/pyproject.toml",
        "caravan.toml",
        *(f"certificates/{name}" for name in ("ca.crt", "ca.key", "server.crt", "server.key")),
        "documents.jsonl",
        *(f"nodes/{name}" for name in ("lima.key", "lima.pub", "oslo.key", "oslo.pub")),
    ]
    assert Deployment.read(tmp_path / "fed") == made
    assert (made.config.deployment.nodes, made.config.deployment.port) == (("oslo", "lima"), 4000)
    assert Catalogue.read(made.documents).ids == ("d0", "d1")


def test_the_documents_of_a_data_set_can_be_shared(tmp_path):
    assert len(Catalogue.read(init_deployment(tmp_path / "fed", "helpdesk", ["oslo"]).documents)) == 107


def test_a_data_set_without_documents_is_refused(tmp_path):
    write_table(tmp_path / "data/train.csv", ("text", "label"), [("a", "b")])
    with pytest.raises(DataError, match="has queries but no documents"):
        init_deployment(tmp_path / "fed", str(tmp_path / "data"), ["oslo"])
    assert not (tmp_path / "fed").exists()


def test_private_keys_can_be_read_by_their_owner_alone(tmp_path, documents):
    folder = init_deployment(tmp_path / "fed", documents, ["oslo", "lima"]).folder
    keys = sorted(folder.rglob("*.key"))
    assert len(keys) == 4
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_a_private_key_that_others_can_read_is_refused(tmp_path, documents):
    made = init_deployment(tmp_path / "fed", documents, ["oslo"])
    made.check_files(made.key("oslo"))
    made.key("oslo").chmod(0o640)
    with pytest.raises(StorageError, match=r"oslo\.key: a private key that others can read; chmod 600 it"):
        made.check_files(made.key("oslo"))
    with pytest.raises(StorageError, match=r"lima\.key: not there"):
        made.check_files(made.key("lima"))


def test_nothing_is_ever_overwritten(tmp_path, documents):
    init_deployment(tmp_path / "fed", documents, ["oslo"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = listing(tmp_path)
    for name in ("fed", "empty", "link", "documents.csv"):
        with pytest.raises(StorageError, match="is there already, and keys are never overwritten"):
            init_deployment(tmp_path / name, documents, ["oslo"])
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("host", "name", "address"),
    [
        ("fed.example.org", "fed.example.org", None),
        ("192.0.2.7", None, "192.0.2.7"),
        ("2001:db8::1", None, "2001:db8::1"),
    ],
)
def test_the_servers_certificate_is_of_its_authority_and_valid_for_the_host_and_loopback(
    tmp_path, documents, host, name, address
):
    made = init_deployment(tmp_path / "fed", documents, ["oslo"], at(host=host))
    root, server = (
        x509.load_pem_x509_certificate(made.certificate(file).read_bytes()) for file in ("ca.crt", "server.crt")
    )
    server.verify_directly_issued_by(root)
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost"} | ({name} if name else set())
    addresses = {"127.0.0.1", "::1"} | ({address} if address else set())
    assert set(names.get_values_for_type(x509.IPAddress)) == set(map(ipaddress.ip_address, addresses))
    key = serialization.load_pem_private_key(made.certificate("server.key").read_bytes(), None)
    assert key.public_key() == server.public_key()


def test_node_keys_are_pairs_on_p384_in_the_forms_that_flower_reads(tmp_path, documents):
    made = init_deployment(tmp_path / "fed", documents, ["oslo", "lima"])
    pairs = {}
    for node in ("oslo", "lima"):
        private = serialization.load_ssh_private_key(made.key(node).read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp384r1"
        pairs[node] = serialization.load_ssh_public_key(made.public_key(node).read_bytes())
        assert private.public_key() == pairs[node]
    assert pairs["oslo"] != pairs["lima"]


def test_the_settings_file_is_a_config_with_the_paths_made_absolute(tmp_path, documents, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    given = config_from_dict(
        {"seed": 4, "data": {"validation": "held.csv", "text_column": "q"}, "backbone": {"name": "model"}}
    )
    config = init_deployment("fed", documents, ["oslo"], given).config
    assert (config.seed, config.data.text_column) == (4, "q")
    assert (config.data.validation, config.backbone.name) == (str(tmp_path / "held.csv"), str(tmp_path / "model"))
    written = tomllib.loads((tmp_path / "fed/caravan.toml").read_text(encoding="utf-8"))
    assert "path" not in written["data"]


def test_the_flower_app_has_no_code_and_names_modules_that_are_installed(tmp_path, documents):
    made = init_deployment(tmp_path / "fed", documents, ["oslo"])
    assert list(listing(made.app)) == ["pyproject.toml"]
    app = tomllib.loads((made.app / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert app["components"] == {
        "serverapp": "caravan.app.nodes.coordinator:app",
        "clientapp": "caravan.app.nodes.node:app",
    }


def test_without_encryption_there_are_no_keys(tmp_path, documents):
    made = init_deployment(tmp_path / "fed", documents, ["oslo"], at(insecure=True))
    assert list(made.folder.rglob("*.key")) == []


@pytest.mark.parametrize(
    ("config", "nodes", "says"),
    [
        (at(insecure=True, host="192.0.2.7"), ["a"], "--insecure is for tests on one machine: deployment.host is 192"),
        (at(insecure=True, host="fed.example.org"), ["a"], "--insecure is for tests on one machine"),
        (at(insecure=True, bind="0.0.0.0"), ["a"], "deployment.bind is 0.0.0.0, not a loopback address"),
        (at(host="https://example.org"), ["a"], "give a host name or an address, without port"),
        (at(), [], "name one or more distinct nodes"),
        (at(), ["a", "a"], "name one or more distinct nodes"),
        (at(), ["../a"], "a name has up to 64 letters"),
        (at(), ["a b"], "a name has up to 64 letters"),
        (Config(federation=FederationConfig(min_clients=2)), ["a"], "min_clients is 2, there are 1 nodes"),
        (Config(head=HeadConfig(start="centroids")), ["a"], "would pool the nodes' queries"),
    ],
)
def test_settings_that_cannot_work_or_are_not_safe_are_refused_before_anything_is_written(
    tmp_path, documents, config, nodes, says
):
    with pytest.raises(ConfigError) as caught:
        init_deployment(tmp_path / "fed", documents, nodes, config)
    assert says in str(caught.value)
    assert not (tmp_path / "fed").exists()


def test_settings_that_were_made_unsafe_by_hand_are_refused_when_read(tmp_path, documents):
    made = init_deployment(tmp_path / "fed", documents, ["oslo"], at(host="192.0.2.7"))
    path = made.folder / "caravan.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("insecure = false", "insecure = true"), encoding="utf-8")
    with pytest.raises(ConfigError, match="--insecure is for tests on one machine"):
        Deployment.read(made.folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(CaravanError, match=r"no caravan\.toml there; make the folder with `caravan federate init`"):
        Deployment.read(tmp_path)


def test_the_one_node_whose_key_is_here_need_not_be_named(tmp_path, documents):
    made = init_deployment(tmp_path / "fed", documents, ["oslo", "lima"])
    with pytest.raises(ConfigError, match="keys of lima, oslo; name the node with --name"):
        made.only_node()
    made.key("lima").unlink()
    assert made.only_node() == "oslo"
