"""What an experiment found: claims held against figures, tables and charts, as plain records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from caravan.app.charts import Chart

Verdict = Literal["confirmed", "not confirmed", "not testable here"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of the paper beside what was measured.

    Attributes:
        says: the paper's sentence, in short.
        paper: its figure, as text; "-" where it gives none.
        ours: what was measured, as text; "-" where nothing could be.
        verdict: whether the figures bear it out.
        reason: why, in one or two sentences.
        data: on what, with counts, e.g. "sms_spam: 4,472 train, 1,102 test".
        seeds: which seeds were run, e.g. "1, 2, 3".
        interval: of `ours`, as text; "" where there is none.
    """

    says: str
    paper: str
    ours: str
    verdict: Verdict
    reason: str
    data: str = ""
    seeds: str = ""
    interval: str = ""


def verdict(holds: bool | None) -> Verdict:
    """Say a comparison of figures as a verdict; None: there is nothing to compare."""
    if holds is None:
        return "not testable here"
    return "confirmed" if holds else "not confirmed"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under headings; all rows have as many cells as there are columns.

    Attributes:
        title: above it.
        columns: headings, with units.
        rows: cells as they are shown; the paper's figures have a column of their own.
        note: below it: what the reader must know to read it (recipe, caps, what an interval is of).
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that one experiment found.

    Attributes:
        claims: in the order of the paper.
        tables: the first is the main one.
        charts: each is drawn as NAME.png and NAME.svg.
        notes: what was left out and why, how to read it, what comes next; a sentence each.
    """

    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Findings":
        """Take `to_dict`'s values, as JSON gives them back.

        Raises:
            LookupError, TypeError: they are not such values.
        """
        return cls(
            claims=[Claim(**claim) for claim in values["claims"]],
            tables=[Table(**table) for table in values["tables"]],
            charts=[Chart.from_dict(chart) for chart in values["charts"]],
            notes=list(values["notes"]),
        )
