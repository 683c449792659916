"""Bytes on the wire: by round, direction and client."""

from collections.abc import Iterable, Mapping
from typing import Any

from caravan.errors import FederationError


class ByteLedger:
    """Bytes on the wire, by round and direction and, where the caller says so, by client.

    Attributes:
        up: bytes from the clients to the server in all rounds.
        down: bytes from the server to the clients in all rounds.
    """

    def __init__(self) -> None:
        self._rounds: dict[int, dict[str | None, list[int]]] = {}  # round -> client -> [up, down]; None: not said whose

    @property
    def up(self) -> int:
        """Bytes to the server in all rounds."""
        return sum(entry[0] for clients in self._rounds.values() for entry in clients.values())

    @property
    def down(self) -> int:
        """Bytes to the clients in all rounds."""
        return sum(entry[1] for clients in self._rounds.values() for entry in clients.values())

    def add(self, number: int, *, up: int = 0, down: int = 0, client: str | None = None) -> None:
        """Add bytes to those of a round.

        Args:
            number: the round, 1 for the first.
            up: bytes sent to the server.
            down: bytes sent by the server.
            client: whose they are; where it is not said, they count for the round alone.

        Raises:
            FederationError: a number is no whole number, the round is below 1, or bytes are below 0.
        """
        for what, count, least in (("round", number, 1), ("up", up, 0), ("down", down, 0)):
            if type(count) is not int or count < least:  # a NumPy number would not become JSON
                raise FederationError(f"byte ledger: {what} is {count!r}; a whole number from {least} on is needed")
        entry = self._rounds.setdefault(number, {}).setdefault(client, [0, 0])
        entry[0] += up
        entry[1] += down

    def to_json(self) -> list[dict[str, Any]]:
        """Give plain values, a row a round in ascending order.

        Returns:
            Rows {"round", "up", "down"} and, if bytes of clients were named, "clients": {name: {"up", "down"}}; these
            are contained in the round's.
        """
        rows = []
        for number, entries in sorted(self._rounds.items()):
            row: dict[str, Any] = {
                "round": number,
                "up": sum(up for up, _ in entries.values()),
                "down": sum(down for _, down in entries.values()),
            }
            if named := {client: entry for client, entry in entries.items() if client is not None}:
                row["clients"] = {client: {"up": up, "down": down} for client, (up, down) in named.items()}
            rows.append(row)
        return rows

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> "ByteLedger":
        """Go on with a ledger that `to_json` wrote down.

        Raises:
            FederationError: the rows are not of that form, or clients have more bytes than their round.
        """
        ledger = cls()
        try:
            for row in rows:
                up, down = row["up"], row["down"]
                for client, entry in row.get("clients", {}).items():
                    ledger.add(row["round"], up=entry["up"], down=entry["down"], client=client)
                    up, down = up - entry["up"], down - entry["down"]
                ledger.add(row["round"], up=up, down=down)
        except (AttributeError, KeyError, TypeError) as error:
            raise FederationError(
                f"byte ledger: a row cannot be read ({type(error).__name__}: {error}); delete it and start again"
            ) from None
        return ledger
