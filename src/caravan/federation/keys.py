"""Keys and certificates of a federation: its own authority, the server's certificate, the nodes' keys."""

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from caravan.errors import FederationError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_YEARS = 10  # nobody else trusts this authority, and a federation that stops by itself one morning helps nobody
_CLOCK_SKEW = timedelta(days=1)  # between the machines
_LOCAL = ("127.0.0.1", "::1", "localhost")  # Flower's own processes on the server reach it there


def write_authority(folder: Path, host: str) -> None:
    """Write an authority (`ca.crt`, `ca.key`) and the server's certificate of it (`server.crt`, `server.key`).

    Args:
        folder: where to; it must be there.
        host: the server's name or address as nodes reach it; loopback addresses are valid always.

    Raises:
        FederationError: the package `cryptography` is missing.
    """
    _import_cryptography()
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    names = [_general_name(name) for name in dict.fromkeys((host, *_LOCAL))]
    root = _name("caravan federation authority")
    own_id = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    signed = (
        _certificate(root, root, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .add_extension(own_id, critical=False)
    )
    _write_certificate(folder / "ca.crt", signed, authority)
    _write_private(folder / "ca.key", _pem(authority))
    issued = (
        _certificate(_name(host), root, server.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_id), critical=False)
    )
    _write_certificate(folder / "server.crt", issued, authority)
    _write_private(folder / "server.key", _pem(server))


def write_node_key(folder: Path, name: str) -> None:
    """Write a node's key pair, `NAME.key` and `NAME.pub`: ECDSA on P-384 in OpenSSH's forms, as Flower takes them.

    Raises:
        FederationError: the package `cryptography` is missing.
    """
    _import_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(
        folder / f"{name}.key",
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public + f" {name}\n".encode())


def is_loopback(host: str) -> bool:
    """Whether an address leads to this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _import_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise FederationError(f'keys need cryptography ({error}); pip install "caravan[federated]"') from None


def _certificate(
    subject: "x509.Name", issuer: "x509.Name", key: "ec.EllipticCurvePublicKey"
) -> "x509.CertificateBuilder":
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=365 * _YEARS))
    )


def _usage(*, certificates: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> "x509.Name":
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common[:64])])  # X.520: 64 characters at most


def _general_name(host: str) -> "x509.GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: "ec.EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_certificate(path: Path, builder: "x509.CertificateBuilder", key: "ec.EllipticCurvePrivateKey") -> None:
    from cryptography.hazmat.primitives import hashes, serialization

    path.write_bytes(builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody else could read at any moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
