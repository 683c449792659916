"""What the experiments found, as one page: report.html without any other file, and report.md."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from caravan.app.reproduction.findings import Claim, Findings, Table
from caravan.errors import StorageError
from caravan.files import whole_file

_CLAIM_COLUMNS = (
    "the paper says",
    "paper",
    "ours",
    "95% interval",
    "verdict",
    "why",
    "data",
    "seeds",
    "backbone",
    "command",
)
_SHOWN = 5  # of these side by side on the page, the others below them

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --paper: #ffffff; --line: #d5dae0; --soft: #f4f6f8; --good: #0b6e4f;
  --bad: #a63d00; --open: #5c6570; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #16191d; --line: #3a4149; --soft: #20252b;
  --good: #5fd0a5; --bad: #ffa066; --open: #a9b2bc; } }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0 1rem; }
caption { text-align: left; font-weight: 600; padding: 0.4rem 0; }
th, td { padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { background: var(--soft); white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
.confirmed { color: var(--good); font-weight: 600; } .not-confirmed { color: var(--bad); font-weight: 600; }
.not-testable-here { color: var(--open); font-weight: 600; }
.claims { width: 100%; } .claims th { white-space: normal; }
.claims tr:first-child td { border-bottom: 0; padding-top: 0.7rem; } .claims td:nth-child(4) { white-space: nowrap; }
.claims tr:first-child td:first-child { font-weight: 600; }
.why td { padding-bottom: 0.7rem; } .why span { color: var(--open); font-size: 0.85rem; }
figure { display: inline-block; margin: 0.5rem 1rem 0.5rem 0; max-width: 100%; }
figure img { width: 36rem; max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
code { background: var(--soft); padding: 0.1rem 0.3rem; overflow-wrap: anywhere; }
.note { color: var(--open); font-size: 0.9rem; max-width: 60rem; }
"""


@dataclass(frozen=True)
class Chapter:
    """One experiment's part of the page.

    Attributes:
        folder: where its files lie.
        results: what its `results.json` holds, with findings.
        findings: of these.
    """

    folder: Path
    results: Mapping[str, Any]
    findings: Findings

    @classmethod
    def read(cls, folder: Path, results: Mapping[str, Any]) -> "Chapter":
        """Take an experiment's results.

        Raises:
            StorageError: they are not as caravan writes them.
        """
        try:
            findings = Findings.from_dict(results["findings"])
            chapter = cls(folder, results, findings)
            markdown_of(chapter)
        except (LookupError, TypeError) as error:
            what = f"not as caravan writes it ({type(error).__name__}: {error})"
            raise StorageError(f"{folder / 'results.json'}: {what}; remove it, or choose another --out") from None
        return chapter

    @property
    def name(self) -> str:
        """The experiment's."""
        return self.results["name"]

    @property
    def facts(self) -> str:
        """In a sentence: form, backbone, device, machine, versions."""
        backbone, machine = self.results["backbone"], self.results["machine"]
        versions = ", ".join(f"{name} {machine[name]}" for name in ("caravan", "torch", "transformers", "python"))
        gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
        several = len(self.results["machines"])
        more = f" Measured on {several} machines; results.json says what on which." if several > 1 else ""
        return (
            f"{self.results['form'].capitalize()} form; backbone {backbone['name']} on {backbone['device']}; "
            f"{machine['processor']}, {machine['threads']} threads{gpu}; {versions}.{more}"
        )


def markdown_of(chapter: Chapter) -> str:
    """One experiment as Markdown: what its `table.md` holds."""
    findings = chapter.findings
    parts = [f"# {chapter.name}\n", f"`{chapter.results['command']}`\n", f"{chapter.facts}\n"]
    if findings.claims:
        parts += ["## The paper's claims\n", _markdown(_claims_table([(chapter, claim) for claim in findings.claims]))]
    parts += [f"## {table.title}\n\n{_markdown(table)}" for table in findings.tables]
    parts += [f"![{chart.title}]({chart.name}.svg)\n" for chart in findings.charts]
    parts += ["\n".join(f"- {note}" for note in findings.notes) + "\n"] if findings.notes else []
    return "\n".join(parts)


def write_page(folder: Path, chapters: Sequence[Chapter]) -> None:
    """Write report.html and report.md over all experiments.

    Raises:
        StorageError: a file cannot be read or written.
    """
    with whole_file(folder / "report.html") as temporary:
        temporary.write_text(_html(chapters), encoding="utf-8")
    with whole_file(folder / "report.md") as temporary:
        temporary.write_text(_report_markdown(chapters), encoding="utf-8")


def _claims_table(claims: Sequence[tuple[Chapter, Claim]]) -> Table:
    rows = [
        (
            *(claim.says, claim.paper, claim.ours, claim.interval, claim.verdict, claim.reason, claim.data),
            *(claim.seeds, chapter.results["backbone"]["name"], chapter.results["command"]),
        )
        for chapter, claim in claims
    ]
    return Table(title="The paper's claims", columns=_CLAIM_COLUMNS, rows=rows)


def _all_claims(chapters: Sequence[Chapter]) -> Table:
    claims = [(chapter, claim) for chapter in chapters for claim in chapter.findings.claims]
    return _claims_table(claims)


def _report_markdown(chapters: Sequence[Chapter]) -> str:
    parts = ["# The paper's tables and figures, measured again\n", "## Claims\n", _markdown(_all_claims(chapters))]
    for chapter in chapters:
        text = markdown_of(chapter).replace("](", f"]({chapter.folder.name}/")
        parts.append(text.replace("\n## ", "\n### ").replace("# ", "## ", 1))
    return "\n".join(parts)


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    text = "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)
    return text + (f"\n{table.note}\n" if table.note else "")


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _html(chapters: Sequence[Chapter]) -> str:
    title = "The paper's tables and figures, measured again"
    links = " · ".join(f'<a href="#{escape(chapter.name)}">{escape(chapter.name)}</a>' for chapter in chapters)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n<p>The paper is arXiv:2509.16508. Each row says what it states and what was measured "
        f"here. {links}</p>\n{_html_claims(_all_claims(chapters))}\n"
        f"{''.join(_html_chapter(chapter) for chapter in chapters)}</body></html>\n"
    )


def _html_chapter(chapter: Chapter) -> str:
    findings = chapter.findings
    notes = "".join(f"<li>{escape(note)}</li>" for note in findings.notes)
    return (
        f'<section id="{escape(chapter.name)}"><h2>{escape(chapter.name)}</h2>\n'
        f"<p><code>{escape(chapter.results['command'])}</code></p>\n<p class=note>{escape(chapter.facts)}</p>\n"
        + "".join(_figure(chapter, chart.name, chart.title) for chart in findings.charts)
        + "".join(_html_table(table) for table in findings.tables)
        + (f"<ul>{notes}</ul>" if notes else "")
        + "</section>\n"
    )


def _figure(chapter: Chapter, name: str, title: str) -> str:
    """The picture itself inside the page: it can be sent as one file."""
    try:
        picture = b64encode((chapter.folder / f"{name}.svg").read_bytes()).decode("ascii")
    except OSError as error:  # removed by hand, or by a run of this experiment that ends right now
        return f"<p class=note>{escape(title)}: no picture ({error.strerror}); repeat the command for it.</p>\n"
    return f'<figure><img alt="{escape(title)}" src="data:image/svg+xml;base64,{picture}"></figure>\n'


def _html_claims(table: Table) -> str:
    """Figures and verdict in one row, what explains them in a second below it: ten columns fit no screen."""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns[:_SHOWN])
    bodies = ""
    for row in table.rows:
        reason, *rest = row[_SHOWN:]
        facts = zip(table.columns[_SHOWN + 1 :], rest, strict=True)
        said = " · ".join(f"{escape(name)}: {_code(name, text)}" for name, text in facts if text)
        cells = "".join(_html_cell(cell) for cell in row[:_SHOWN])
        bodies += f"<tbody><tr>{cells}</tr>\n<tr class=why><td colspan={_SHOWN}>{escape(reason)}"
        bodies += f"<br><span>{said}</span></td></tr></tbody>\n"
    caption = f"<caption>{escape(table.title)}</caption>"
    return f"<div class=wide><table class=claims>{caption}<thead><tr>{head}</tr></thead>\n{bodies}</table></div>\n"


def _code(name: str, text: str) -> str:
    return f"<code>{escape(text)}</code>" if name == "command" else escape(text)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(_html_cell(cell) for cell in row)}</tr>\n" for row in table.rows)
    note = f"<p class=note>{escape(table.note)}</p>\n" if table.note else ""
    caption = f"<caption>{escape(table.title)}</caption>"
    return (
        f"<div class=wide><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n{note}"
    )


def _html_cell(cell: str) -> str:
    known = cell in ("confirmed", "not confirmed", "not testable here")
    mark = f' class="{cell.replace(" ", "-")}"' if known else ""
    return f"<td{mark}>{escape(str(cell))}</td>"
