"""What the terminal shows: progress bars, tables, hits and facts."""

import platform
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from caravan.errors import StorageError

if TYPE_CHECKING:
    from caravan.app.communication import Communication, Trained
    from caravan.app.comparison import Comparison
    from caravan.app.demo import DemoResult
    from caravan.data.records import Hit
    from caravan.training.progress import Progress as Step


_LEAST_COLUMNS = 80
_SENT = {"none": "float32", "int8": "int8"}  # federation.codec -> in what form the numbers are sent


class Bars:
    """Progress bars on standard error where it is a terminal, one at a time; pass the object itself as a `report`."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,  # else Rich would leave an empty line in a log
        )
        self._task: tuple[str, TaskID] | None = None

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, step: "Step") -> None:
        """Show how far a task is; a task of another name replaces it."""
        note = "" if step.loss is None else f"loss {step.loss:.3f}"
        note += "" if step.epsilon is None else f" epsilon {step.epsilon:.2f}"
        note += "" if step.rate is None else f"  {step.rate:,.0f} queries/s"
        if self._task is None or self._task[0] != step.task:
            if self._task is not None:
                self._progress.remove_task(self._task[1])
            self._task = (step.task, self._progress.add_task(step.task, total=step.total, note=note))
        self._progress.update(self._task[1], completed=step.done, total=step.total, note=note)
        if step.warning is not None:
            self._console.print(Text(one_line(step.warning)), soft_wrap=True)


def print_comparison(comparison: "Comparison", latency: Mapping[str, float] | None) -> None:
    """Print the rows as a table, the best recall@1 in bold, and what else is known of the last one."""
    from caravan.app.report import cells, headings

    console = _console()
    name, split = one_line(comparison.dataset.name), comparison.split
    title = f"{name}: {len(comparison.examples):,} {split} queries, {len(comparison.dataset.catalogue):,} documents"
    table = _figures(headings(), title)
    best = max(row.metrics["recall@1"].value for row in comparison.rows)
    for row in comparison.rows:
        style = "bold" if row.metrics["recall@1"].value == best else ""
        table.add_row(*(Text(one_line(cell)) for cell in cells(row)), style=style)
    console.print(table)
    last, last_name = comparison.rows[-1], one_line(comparison.rows[-1].name)
    if "calibration_error" in last.metrics:
        error = 100 * last.metrics["calibration_error"].value
        _say(console, f"{last_name}: the first hit's probability is off by {error:.1f} points on average (ECE).")
    if latency:
        encode, search, p95 = latency["encode_ms"], latency["search_ms"], latency["search_p95_ms"]
        took = f"{search:.1f} ms (p95 {p95:.1f}), encoding alone {encode:.1f} ms"
        _say(console, f"{last_name}: one query takes {took}.")
    if comparison.dataset.skipped:
        _say(console, f"{comparison.dataset.skipped:,} malformed rows were skipped.")


def print_communication(communication: "Communication", trained: "Sequence[Trained]") -> None:
    """Print what is sent by each method, a table a model, and beside the first one what training came to."""
    console = _console()
    found = {(row.method, _SENT[row.codec]): row for row in trained}
    count = len(communication.dataset.catalogue)
    for skeleton in communication.skeletons:
        rows = communication.tables[skeleton.name]
        title = f"{one_line(skeleton.name)} ({skeleton.numbers / 1e6:,.1f}M numbers), a head of {count:,} documents"
        first = skeleton is communication.skeletons[0]
        headings = ["trained", "codec", "numbers", "up", "of LoRA", "head", "both", "of full", "both, down"]
        table = _figures([*headings, "R@1 %"] if first and trained else headings, title)
        for row in rows:
            cells = [row.method, row.codec, f"{row.numbers:,}", f"{row.part:,}", _share(row.to_lora), f"{row.head:,}"]
            cells += [f"{row.part + row.head:,}", _share(row.to_full), f"{row.down:,}"]
            if first and trained:
                one = found.get((row.method, row.codec))
                cells.append("" if one is None else f"{100 * one.recall.value:.1f}")
            table.add_row(*cells)
        console.print(table)
    _say(
        console,
        "Bytes of one client in one round. up: what is trained beside the head; of LoRA: the same by a LoRA of rank 8 "
        "on queries and values with the same codec; of full: both by the full adapter and its head in float32.",
        style="dim",
    )


def _figures(headings: Sequence[str], title: str) -> Table:
    table = Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False, pad_edge=False
    )
    for number, heading in enumerate(headings):
        # Names fold; a figure that is cut would be another figure.
        table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return table


def _share(ratio: float | None) -> str:
    """A ratio as people say it: 1/72, or 2.5 times."""
    if ratio is None:
        return "-"
    if ratio >= 0.5:
        return f"{ratio:,.2f}"
    return f"1/{1 / ratio:.3g}" if ratio > 0.01 else f"1/{1 / ratio:,.0f}"


def print_hits(queries: Sequence[str], results: "Sequence[Sequence[Hit]]") -> None:
    """Print the hits of each query with their probabilities."""
    console = _console()
    for query, hits in zip(queries, results, strict=True):
        _say(console, one_line(query), style="bold")
        for hit in hits:
            heading = f"{hit.doc_id}: {hit.title}" if hit.title else hit.doc_id
            _say(console, f"{hit.rank:3}. {hit.probability:6.1%}  {one_line(heading)}")
            _say(console, f"             {_shortened(one_line(hit.text))}", style="dim")


def print_searches(result: "DemoResult") -> None:
    """Print queries that ours answers and MIPS does not."""
    console = _console()
    total = f"{result.won} test queries right here and wrong under MIPS, {result.lost} the other way round"
    console.print(f"\n[bold]Where training helped[/bold] ({total}; three of them):")
    for search in result.searches:
        _say(console, f'\n  "{one_line(search.query)}"')
        _say(console, f"    caravan  {one_line(f'{search.ours}: {search.ours_title}')}", style="green")
        _say(console, f"    MIPS     {one_line(f'{search.mips}: {search.mips_title}')}", style="red")


def describe_installation() -> dict[str, Any]:
    """Facts about this installation: versions, processor, what the optional extras add."""
    from importlib.util import find_spec

    import torch

    from caravan import __version__
    from caravan.training.features import default_cache

    extras = {"federated": "flwr", "ray": "ray", "datasets": "datasets", "report": "matplotlib", "compare": "peft"}
    extras |= {"private": "dp_accounting", "ask": "openai"}
    return {
        "caravan": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "bfloat16_on_cpu": torch.cpu._is_avx512_bf16_supported(),
        "extras": [extra for extra, module in extras.items() if find_spec(module)],
        "cache": str(default_cache()),
    }


def describe_model(folder: str) -> dict[str, Any]:
    """Facts about a saved retriever: what it is made of, on what it was trained, how good it was.

    Raises:
        StorageError: the folder is no retriever, or its record is not as caravan writes it.
    """
    from caravan.storage import load

    retriever = load(folder)
    record, backbone = retriever.record, retriever.encoder.backbone
    sizes = {name: parameter.numel() for name, parameter in retriever.named_trainables()}
    facts: dict[str, Any] = {
        "folder": str(Path(folder)),
        "documents": len(retriever.catalogue),
        "backbone": {
            "name": backbone.config.name,
            "hash": backbone.hash,
            "family": backbone.family,
            "pooling": backbone.pooling,
        },
        "adapter": retriever.adapter_config.kind,
        "trained_parameters": sizes,
        "trained_mib": round(4 * sum(sizes.values()) / 2**20, 2),
    }
    try:
        facts |= _recorded(record)
    except (AttributeError, LookupError, TypeError) as error:
        what = f"not as caravan writes it ({type(error).__name__}: {error})"
        raise StorageError(f"{folder}/training.json: {what}; restore the file, or train again") from None
    return facts


def _recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in ("dataset", "seed", "seconds", "versions", "latency", "privacy"):
        if name in record:
            facts[name] = record[name]
    if "metrics" in record:
        facts["recall@1"] = {name: row["metrics"]["recall@1"]["value"] for name, row in record["metrics"].items()}
    if "learning_rates" in record:  # those that were chosen
        facts["learning_rates"] = {
            f"{stage}.{name}": found[name]
            for stage, found in record["learning_rates"].items()
            for name in found["lines"]
        }
    if "version" in record:
        facts["version"] = record["version"]["number"]
    if "federation" in record:
        facts["clients"] = {client["name"]: client["examples"] for client in record["federation"]["clients"]}
        facts["rounds"] = len(record["federation"]["rounds"])
        facts["sent_mib"] = sent_mib(record)
    return facts


def sent_mib(record: Mapping[str, Any]) -> dict[str, float]:
    """Give what the clients of a federated training sent ("up") and were sent ("down"), in MiB."""
    rounds = record["federation"]["rounds"]
    totals = {direction: sum(each[f"bytes_{direction}"] for each in rounds) for direction in ("up", "down")}
    return {direction: round(total / 2**20, 3) for direction, total in totals.items()}


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print nested facts, one a line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if isinstance(value, Mapping):
            table.add_row(Text(name), "")
            for key, inner in value.items():
                table.add_row(Text(f"  {one_line(key)}"), Text(one_line(_plain(inner))))
        else:
            table.add_row(Text(name), Text(one_line(_plain(value))))
    _console().print(table)


def one_line(text: str) -> str:
    """A text as it may be shown: on one line, and without what would steer the terminal (colours, cursor, title)."""
    return "".join(character for character in " ".join(text.split()) if unicodedata.category(character) != "Cc")


def _console() -> Console:
    if sys.stdout is None or not sys.stdout.isatty():
        return Console(width=120)  # a pipe or a file has no width
    console = Console()
    # In less the figures have no room: better that the terminal wraps the lines.
    return console if console.width >= _LEAST_COLUMNS else Console(width=_LEAST_COLUMNS)


def _say(console: Console, text: str, *, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shortened(text: str, width: int = 90) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
