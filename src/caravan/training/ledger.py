"""The privacy ledger on a client's disk: what each data set has been used for, over all rounds, runs and restarts.

It lies outside of any run's folder: in `$CARAVAN_LEDGER`, else in `ledger` of the user's data folder. In it

- `ledger.jsonl` and `head.json`: the entries, see `caravan.training.journal`;
- `units/NAME.npy`: which units a data set has, as sorted 8-byte hashes; NAME is made of them;
- `secret`: the key of these hashes, made at random, so that no other file tells whether somebody's text is in the data.

An entry is on the disk before the steps are taken that it announces, and counts whether they were taken or not. The
sampling rate and the number of units tell how large the data is: the folder belongs where the data is, and stays there.
Whoever may write it can delete it as a whole or put back an old copy; nothing here shows that.
"""

import hashlib
import os
import secrets
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import platformdirs

from caravan.data.records import Example
from caravan.errors import PrivacyError
from caravan.training.accounting import Guarantee, Mechanism, epsilon, in_figures
from caravan.training.journal import RESTORE, Journal, replace_file

Unit = Literal["example", "user"]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Units:
    """Whom a guarantee is about.

    Attributes:
        kind: whether one example or one user is hidden.
        names: what the data is known by: every example's text and, where users are hidden, every user. Labels are no
            part of it, so that the same texts under other labels are the same data.
    """

    kind: Unit
    names: frozenset[str]


@dataclass(frozen=True)
class Entry:
    """One line: steps that were announced.

    Attributes:
        time: in UTC, ISO 8601.
        data: the name of the data set's units.
        unit: what the guarantee hides.
        stage: what the steps were for.
        run: which run took them, or "".
        part: which of the run's parts, whose rows no other part of it has, or "".
        mechanism: the steps.
    """

    time: str
    data: str
    unit: Unit
    stage: str
    run: str
    part: str
    mechanism: Mechanism


def default_folder() -> Path:
    """Where the ledger lies unless told otherwise."""
    place = os.environ.get("CARAVAN_LEDGER")
    return Path(place) if place else platformdirs.user_data_path("caravan") / "ledger"


def identify(examples: Iterable[Example], user_column: str | None = None) -> Units:
    """Name the units of examples; texts that differ in case or spacing alone are one.

    Args:
        examples: one or more.
        user_column: the column that names an example's user, where users are to be hidden.

    Raises:
        PrivacyError: there is no example, or one has no user.
    """
    names = set()
    for example in examples:
        text = unicodedata.normalize("NFKC", example.text).casefold()
        names.add(f"text {' '.join(text.split())}")
        if user_column is not None:
            user = example.columns.get(user_column, "")
            if not user:
                where = example.query_id or example.text[:40]
                raise PrivacyError(f"example {where!r} has no {user_column!r}; give each example its user")
            names.add(f"user {user}")
    if not names:
        raise PrivacyError("there are no examples whose privacy could be accounted for; give at least one")
    return Units("example" if user_column is None else "user", frozenset(names))


@dataclass(frozen=True)
class Ledger:
    """What the data at hand has been used for: by every entry whose data shares at least one unit with it, in full.

    Attributes:
        folder: where the files lie.
        unit: what is hidden.
        hashes: uint64 (U,), sorted, without repeats: the units.
        secret: the key that they were made with.
        run: which run the data is used in; entries of other parts of the same run are not counted, since a row lies in
            one part alone. Not so where users are hidden, whose rows may lie in several parts. Never give two runs one
            name.
        part: which part of the run's rows this is, such as a simulated client.
    """

    folder: Path
    unit: Unit
    hashes: Hashes
    secret: bytes = field(repr=False)
    run: str = ""
    part: str = ""
    _shares: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, folder: str | Path, units: Units, *, run: str = "", part: str = "") -> "Ledger":
        """Open a folder's ledger, made if it is not there, for the data of these units.

        Raises:
            PrivacyError: the folder cannot be written, or its files are not as they were left.
        """
        journal = Journal(Path(folder))
        with journal.locked(make=True):
            if not journal.exists() and not (journal.folder / "units").exists():
                if not (journal.folder / "secret").exists():  # else a kill left it alone
                    replace_file(journal.folder / "secret", secrets.token_bytes(32))
                journal.begin()
            secret = _read_secret(journal.folder)
            journal.read()
        names = (name.encode("utf-8", "surrogatepass") for name in units.names)
        hashed = b"".join(hashlib.blake2b(name, digest_size=8, key=secret).digest() for name in names)
        return cls(journal.folder, units.kind, np.unique(np.frombuffer(hashed, dtype="<u8")), secret, run, part)

    @property
    def data(self) -> str:
        """The name of this set of units."""
        return _name_of(self.hashes)

    def spent(self) -> list[Mechanism]:
        """Give all that counts for this data, in the order in which it was announced.

        Raises:
            PrivacyError: the files are not as they were left; or the data was used with another unit, and guarantees
                for an example and for a user do not add up.
        """
        journal = Journal(self.folder)
        with journal.locked():
            return self._counted(_entries(journal, journal.read().values))

    def guarantee(self, delta: float) -> Guarantee:
        """Give the epsilon of all that counts for this data.

        Raises:
            PrivacyError: as `spent` and `accounting.epsilon` do.
        """
        return epsilon(self.spent(), delta)

    def reserve(self, mechanism: Mechanism, *, cap: float | None, delta: float, stage: str = "") -> None:
        """Announce steps, before they are taken; on return they are on the disk.

        Two processes may do so at once: each sees what the other has announced.

        Args:
            mechanism: the steps.
            cap: the most that epsilon may become by them; None for no limit.
            delta: at which the cap is meant.
            stage: what they are for.

        Raises:
            PrivacyError: they would cross the cap, and nothing is written; or as `spent`; or the disk takes nothing.
        """
        journal = Journal(self.folder)
        with journal.locked():
            lines = journal.read()
            entries = _entries(journal, lines.values)
            before = self._counted(entries)
            if cap is not None:
                _check_cap(before, mechanism, cap, delta)
            if all(entry.data != self.data for entry in entries):
                (self.folder / "units").mkdir(exist_ok=True, mode=0o700)
                replace_file(_units_file(self.folder, self.data), _as_npy(self.hashes))
            now = datetime.now(UTC).isoformat(timespec="seconds")
            entry = Entry(now, self.data, self.unit, stage, self.run, self.part, mechanism)
            journal.append(lines, _to_values(entry))

    def _counted(self, entries: Sequence[Entry]) -> list[Mechanism]:
        if _read_secret(self.folder) != self.secret:  # another ledger by now, where no unit would be recognised
            raise PrivacyError(f"{self.folder}: was replaced while it was in use; {RESTORE}")
        mechanisms = []
        for entry in entries:
            apart = self.unit == entry.unit == "example" and self.run == entry.run != "" and self.part != entry.part
            if apart or not self._shared(entry.data):
                continue
            if entry.unit != self.unit:
                raise PrivacyError(
                    f"{self.folder}: this data was used with unit = {entry.unit!r} before, and now unit = "
                    f"{self.unit!r} is asked for, which does not add up with it; use unit = {entry.unit!r}"
                )
            mechanisms.append(entry.mechanism)
        return mechanisms

    def _shared(self, data: str) -> bool:
        if data not in self._shares:
            self._shares[data] = bool(np.isin(_read_units(self.folder, data), self.hashes).any())
        return self._shares[data]


def read_ledger(folder: str | Path) -> list[tuple[Ledger, list[Entry]]]:
    """Give every data set of a folder's ledger with the entries that were written for it; nothing is written.

    Raises:
        PrivacyError: there is no ledger, or its files are not as they were left.
    """
    journal = Journal(Path(folder))
    if not journal.exists():
        raise PrivacyError(f"{folder}: there is no privacy ledger; name its folder, or train with privacy first")
    with journal.locked():
        entries = _entries(journal, journal.read().values)
        secret = _read_secret(journal.folder)
        names: dict[tuple[str, Unit], None] = dict.fromkeys((entry.data, entry.unit) for entry in entries)
        found = []
        for data, unit in names:
            own = [entry for entry in entries if (entry.data, entry.unit) == (data, unit)]
            found.append((Ledger(journal.folder, unit, _read_units(journal.folder, data), secret), own))
        return found


def _check_cap(before: list[Mechanism], mechanism: Mechanism, cap: float, delta: float) -> None:
    after = epsilon([*before, mechanism], delta)
    if not after.epsilon <= cap:  # a cap that is no number holds everything back
        so_far = in_figures(epsilon(before, delta).epsilon)
        raise PrivacyError(
            f"these {mechanism.steps:,} steps would bring epsilon from {so_far} to {in_figures(after.epsilon)} at "
            f"delta = {delta:.3g}, and the cap is {cap:g}; nothing was done: add noise, take fewer steps, or stop here"
        )


def _to_values(entry: Entry) -> dict[str, Any]:
    values = asdict(entry)
    spend = entry.mechanism
    del values["mechanism"]
    numbers = {"sampling": float(spend.sampling), "sigma": float(spend.noise_multiplier), "steps": int(spend.steps)}
    return values | numbers


def _entries(journal: Journal, lines: Iterable[dict[str, Any]]) -> list[Entry]:
    entries = []
    for line in lines:
        values = dict(line)
        try:
            spend = Mechanism(values.pop("sampling"), values.pop("sigma"), values.pop("steps"))
            entry = Entry(**values, mechanism=spend)
            if entry.unit not in ("example", "user"):
                raise ValueError(f"unit {entry.unit!r}")
        except (KeyError, TypeError, ValueError, PrivacyError) as error:
            # It may be a later version's: what it stands for must not be passed over.
            what = " ".join(str(error).split())[:80]
            raise PrivacyError(f"{journal.place}: an entry cannot be read ({what}); use a later caravan") from None
        entries.append(entry)
    return entries


def _read_secret(folder: Path) -> bytes:
    place = folder / "secret"
    secret = place.read_bytes() if place.exists() else b""
    if len(secret) != 32:
        raise PrivacyError(f"{place}: is lost or damaged, so no data could be recognised; {RESTORE}")
    return secret


def _units_file(folder: Path, data: str) -> Path:
    return folder / "units" / f"{data}.npy"


def _read_units(folder: Path, data: str) -> Hashes:
    place = _units_file(folder, data)
    try:
        hashes = np.load(place, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        hashes = None
    if hashes is None or _name_of(hashes) != data:
        raise PrivacyError(f"{place}: is lost or damaged, so its data could not be recognised; {RESTORE}")
    return cast(Hashes, hashes)


def _name_of(hashes: Hashes) -> str:
    return hashlib.sha256(hashes.tobytes()).hexdigest()[:32]


def _as_npy(hashes: Hashes) -> bytes:
    stream = BytesIO()
    np.save(stream, hashes, allow_pickle=False)
    return stream.getvalue()
