"""Who may ask and who may change: API keys from a file or the environment, compared in constant time."""

import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from caravan.app.web.limits import RefusedError
from caravan.errors import ConfigError

Right = Literal["read", "write"]

VARIABLES: Mapping[Right, str] = {"read": "CARAVAN_READ_KEYS", "write": "CARAVAN_WRITE_KEYS"}

_SHORTEST = 16  # characters; shorter ones can be guessed
_WRITE_IT = "write `read KEY` or `write KEY` a line"


@dataclass(frozen=True)
class Keys:
    """The keys that are known, as hashes, and whether loopback may change documents without one.

    Attributes:
        hashes: SHA-256 of each key, with what it gives the right to; a write key may also read.
        local_changes: asked for on the command line; of no effect where there is a write key.
    """

    hashes: tuple[tuple[bytes, Right], ...] = ()
    local_changes: bool = False

    def check(self, right: Right, headers: Mapping[str, str], peer: str | None) -> None:
        """Let a request pass or refuse it.

        Args:
            right: what it needs.
            headers: its headers, by lower-case name.
            peer: the address it came from.

        Raises:
            RefusedError: it brings no key where one is needed (401), or one without this right (403).
        """
        given = _given(headers)
        if given is not None and self.hashes:
            rights = self._rights(given)
            if right in rights or "write" in rights:
                return
            if not rights:
                raise RefusedError("the key is not known; give one that is", HTTPStatus.UNAUTHORIZED, "unauthorized")
            raise _forbidden("this key may not change documents; give a write key")
        if right == "read":
            if self.hashes:
                raise RefusedError(
                    "a key is needed: send it as `Authorization: Bearer KEY`", HTTPStatus.UNAUTHORIZED, "unauthorized"
                )
            return
        if any(granted == "write" for _, granted in self.hashes):
            raise RefusedError(
                "a write key is needed: send it as `Authorization: Bearer KEY`", HTTPStatus.UNAUTHORIZED, "unauthorized"
            )
        if not self.local_changes:
            raise _forbidden("documents cannot be changed: the service was started without a write key")
        if not _is_local(headers, peer):
            raise _forbidden("documents can be changed from this machine only, and not by a page of another origin")

    def _rights(self, key: str) -> set[Right]:
        digest = _hash(key)
        # All are compared, whichever fits: the time says nothing.
        return {right for known, right in self.hashes if hmac.compare_digest(known, digest)}


def read_keys(file: str | Path | None, environment: Mapping[str, str] = os.environ, *, local_changes: bool) -> Keys:
    """Read keys from a file (`read KEY` or `write KEY` a line, # for comments) and from the environment.

    Args:
        file: the file, or None.
        environment: CARAVAN_READ_KEYS and CARAVAN_WRITE_KEYS hold keys with commas between.
        local_changes: whether loopback may change documents where there is no write key.

    Raises:
        ConfigError: the file cannot be read or has a line of another form, or a key is too short or no ASCII.
    """
    found: list[tuple[str, Right, str]] = []
    if file is not None:
        found.extend(_from_file(Path(file)))
    for right, variable in VARIABLES.items():
        found.extend((variable, right, key) for key in environment.get(variable, "").split(",") if key.strip())
    hashes: list[tuple[bytes, Right]] = []
    for where, right, raw in found:
        key = raw.strip()
        if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            # The key itself is no part of the message: logs are read by others.
            raise ConfigError(f"{where}: a key has at least {_SHORTEST} printable ASCII characters without spaces")
        hashes.append((_hash(key), right))
    return Keys(tuple(hashes), local_changes)


def _from_file(path: Path) -> Iterable[tuple[str, Right, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}; give a file of keys") from None
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] not in ("read", "write"):
            raise ConfigError(f"{path}, line {number}: not a key; {_WRITE_IT}")
        yield f"{path}, line {number}", "write" if words[0] == "write" else "read", words[1]


def _given(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _is_local(headers: Mapping[str, str], peer: str | None) -> bool:
    """From loopback, and not a page of another site in a browser on this machine.

    A browser names the page's origin, and a name that was made to point to this machine (DNS rebinding) shows in Host.
    """
    host = urlsplit(f"//{headers.get('host', '')}")
    origin = urlsplit(headers.get("origin", ""))
    same = "origin" not in headers or origin.netloc == host.netloc
    return same and _is_loopback(peer or "") and _is_loopback(host.hostname or "")


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _hash(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _forbidden(message: str) -> RefusedError:
    return RefusedError(message, HTTPStatus.FORBIDDEN, "forbidden")
