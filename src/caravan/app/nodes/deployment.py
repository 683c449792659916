"""The folder of a federation of real machines: settings, shared documents, certificates, keys, and Flower's app."""

import re
import stat
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import tomli_w

from caravan.config import Config, config_from_dict, read_toml
from caravan.data.catalogue import Catalogue
from caravan.data.dataset import open_source
from caravan.data.formats import read_documents
from caravan.data.tables import BadRows, table_suffix
from caravan.errors import ConfigError, DataError, StorageError
from caravan.federation.keys import is_loopback, write_authority, write_node_key
from caravan.files import whole_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a file's name, and one word of a command
_HOST = re.compile(r"[A-Za-z0-9.:-]{1,253}")
_HEADER = """\
# The settings of this federation. [data] says how files are read: each node names its own file when it starts,
# and data.validation, where set, is a file of queries on the server. What trains is [training], [adapter], [head] and
# [federation]; the server tells it to the nodes. [backbone] must give the same frozen model everywhere.

"""
_NOT_SET_HERE = ("path", "documents", "test", "validation_fraction")  # of [data]


@dataclass(frozen=True)
class Deployment:
    """A federation's folder, on the server or on a node (which has only part of the files).

    Attributes:
        folder: absolute.
        config: what `caravan.toml` says.
    """

    folder: Path
    config: Config

    @classmethod
    def read(cls, folder: str | Path) -> "Deployment":
        """Read and check the settings.

        Raises:
            StorageError: there is no such folder.
            ConfigError: the settings cannot be read or contradict each other.
        """
        place = Path(folder).resolve()
        if not (place / "caravan.toml").is_file():
            raise StorageError(f"{folder}: no caravan.toml there; make the folder with `caravan federate init`")
        config = config_from_dict(read_toml(place / "caravan.toml"), source=f"{folder}/caravan.toml")
        check_deployment(config)
        return cls(place, config)

    @property
    def app(self) -> Path:
        """The code-free Flower app."""
        return self.folder / "app"

    @property
    def documents(self) -> Path:
        """The shared catalogue."""
        return self.folder / "documents.jsonl"

    def certificate(self, name: str) -> Path:
        """A file of TLS: ca.crt, server.crt or server.key."""
        return self.folder / "certificates" / name

    def key(self, node: str) -> Path:
        """A node's private key."""
        return self.folder / "nodes" / f"{node}.key"

    def public_key(self, node: str) -> Path:
        """A node's public key."""
        return self.folder / "nodes" / f"{node}.pub"

    def validation(self) -> Path | None:
        """The server's file of validation queries; a relative path is relative to the folder."""
        name = self.config.data.validation
        return self.folder / name if name else None

    def only_node(self) -> str:
        """The one node whose key lies here.

        Raises:
            ConfigError: there is none, or there are several.
        """
        found = sorted(path.stem for path in (self.folder / "nodes").glob("*.key"))
        found = found or (list(self.config.deployment.nodes) if self.config.deployment.insecure else [])
        if len(found) != 1:
            what = f"keys of {', '.join(found)}" if found else "no node's key"
            raise ConfigError(f"{self.folder}/nodes has {what}; name the node with --name")
        return found[0]

    def check_files(self, *paths: Path) -> None:
        """Refuse to start without a file, or with a private key that others can read.

        Raises:
            StorageError: a file is not there, or its rights are too wide.
        """
        for path in paths:
            if not path.is_file():
                raise StorageError(f"{path}: not there; copy it from the folder that `caravan federate init` made")
            if path.suffix == ".key" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise StorageError(f"{path}: a private key that others can read; chmod 600 it")


def check_deployment(config: Config) -> None:
    """Refuse settings under which real machines must not or cannot work together.

    Raises:
        ConfigError: the settings are insecure on a network, name no node, or contradict each other.
    """
    deployment = config.deployment
    for name in deployment.nodes:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"node {name!r}: a name has up to 64 letters, digits, dots, dashes and underscores")
    if not deployment.nodes or len(set(deployment.nodes)) != len(deployment.nodes):
        raise ConfigError(f"deployment.nodes is {list(deployment.nodes)}; name one or more distinct nodes")
    for setting, host in (("host", deployment.host), ("bind", deployment.bind)):
        if not _HOST.fullmatch(host):
            raise ConfigError(f"deployment.{setting} is {host!r}; give a host name or an address, without port")
        if deployment.insecure and not is_loopback(host):
            raise ConfigError(
                f"--insecure is for tests on one machine: deployment.{setting} is {host}, not a loopback address; "
                "leave --insecure out, and TLS and node keys protect the connection"
            )
    if config.federation.min_clients > len(deployment.nodes):
        raise ConfigError(
            f"federation.min_clients is {config.federation.min_clients}, there are {len(deployment.nodes)} nodes; "
            "lower it"
        )
    if config.head.start == "centroids":
        raise ConfigError('head.start = "centroids" would pool the nodes\' queries; set it to "documents" or "auto"')


def init_deployment(
    folder: str | Path, documents: str, nodes: Sequence[str], config: Config | None = None
) -> Deployment:
    """Make a federation's folder; it appears whole or not at all.

    Args:
        folder: must not be there yet.
        documents: a documents file, or a data set (`helpdesk`, a folder, an id) of which the documents are taken.
        nodes: the nodes' names; their order decides each one's seed.
        config: settings, of which `deployment.nodes` is replaced.

    Raises:
        StorageError: the folder is there, or cannot be written.
        ConfigError: the settings cannot be used, see `check_deployment`.
        DataError: the documents cannot be read.
    """
    config = config or Config()
    config = replace(config, deployment=replace(config.deployment, nodes=tuple(nodes)))
    check_deployment(config)
    place = Path(folder)
    if place.exists() or place.is_symlink():
        raise StorageError(f"{folder}: is there already, and keys are never overwritten; choose a new name")
    catalogue = _read_catalogue(documents, config)
    values = tomllib.loads(_with_absolute_paths(config).to_toml())
    values["data"] = {name: value for name, value in values["data"].items() if name not in _NOT_SET_HERE}
    del values["evaluation"]
    with whole_folder(folder) as new:
        (new / "caravan.toml").write_text(_HEADER + tomli_w.dumps(values), encoding="utf-8")
        catalogue.write(new / "documents.jsonl")
        (new / "app").mkdir()
        (new / "app" / "pyproject.toml").write_text(tomli_w.dumps(_flower_app()), encoding="utf-8")
        if not config.deployment.insecure:
            for name in ("certificates", "nodes"):
                (new / name).mkdir(mode=0o700)
            write_authority(new / "certificates", config.deployment.host)
            for node in nodes:
                write_node_key(new / "nodes", node)
    return Deployment.read(folder)


def _with_absolute_paths(config: Config) -> Config:
    """Flower's processes run in another folder than the one in which the paths were written."""
    if config.data.validation:
        validation = str(Path(config.data.validation).absolute())
        config = replace(config, data=replace(config.data, validation=validation))
    if Path(config.backbone.name).is_dir():
        config = replace(config, backbone=replace(config.backbone, name=str(Path(config.backbone.name).absolute())))
    return config


def _read_catalogue(documents: str, config: Config) -> Catalogue:
    path = Path(documents)
    if table_suffix(path):
        return Catalogue(read_documents(path, BadRows()))
    found = open_source(replace(config.data, path=documents, documents=None)).documents(BadRows())
    if found is None:
        raise DataError(f"{documents}: has queries but no documents; give a documents file (doc_id, text)")
    return Catalogue(found)


def _flower_app() -> dict[str, object]:
    """Flower's description of an app that has no code of its own: it names modules that every node has installed."""
    return {
        "project": {
            "name": "caravan-federation",
            "version": version("caravan"),
            "description": "Federated training of a retriever; the code is that of the installed caravan.",
            "license": "Apache-2.0",
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "caravan",
                    "components": {
                        "serverapp": "caravan.app.nodes.coordinator:app",
                        "clientapp": "caravan.app.nodes.node:app",
                    },
                    "config": {"out": "", "resume": False},
                }
            }
        },
    }
