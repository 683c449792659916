"""The model card of a saved retriever: what it is, what it was made of, how well it ranks and how to load it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caravan.model.retriever import Retriever

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"

_INTRODUCTION = """\
A query goes in, the documents that answer it come out. A frozen language model reads the query through a trained
adapter on its token embeddings; a linear head with one row a document scores the result (classifier-as-retriever,
[arXiv:2509.16508](https://arxiv.org/abs/2509.16508)).
"""

_LOADING = """\
## How to load it

```python
from caravan import load

retriever = load("path/to/this/folder")
for hit in retriever.search("a question", k=5):
    print(hit.rank, hit.doc_id, round(hit.probability, 3), hit.title)
```

The frozen model is not in this folder: `load` finds it by the name in `config.json` and verifies its hash. Where it
cannot be found, give it: `load(folder, backbone=...)`.
"""


def model_card(retriever: Retriever) -> str:
    """Write the model card: Markdown with the YAML header of Hugging Face's cards.

    Args:
        retriever: what is described; of its `record` whatever is there is told: dataset, history, federation, metrics,
            privacy, seed, seconds and versions.

    Returns:
        The text of `README.md`; the same retriever gives the same text.
    """
    record = retriever.record
    parts = [_header(retriever), f"# {_title(record)}\n", _INTRODUCTION, "".join(_facts(retriever))]
    measures = _part(record, "metrics")
    if measures:
        split = _cell(record.get("metrics_split") or "held-out")
        parts.append(f"## Results\n\nOn the {split} queries; in brackets a bootstrap interval.\n\n{_table(measures)}")
    if isinstance(record.get("privacy"), str):
        parts.append(f"## Privacy\n\n{record['privacy'].strip()}\n")
    return "\n".join([*parts, _LOADING])


def _header(retriever: Retriever) -> str:
    lines = ["---", "library_name: caravan"]
    base = _public_name(retriever)
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")  # a JSON string is a YAML string
    return "\n".join([*lines, "tags:", "- caravan", "- retrieval", "- classifier-as-retriever", "---\n"])


def _public_name(retriever: Retriever) -> str | None:
    """The backbone's id on the hub, or None: a path says nothing to others, and too much."""
    config = retriever.encoder.backbone.config
    if config.random_weights:
        return None
    if config.name == "minilm":
        return _MINILM
    place = Path(config.name).expanduser()
    return None if place.is_absolute() or place.is_dir() else config.name


def _title(record: Mapping[str, Any]) -> str:
    name = _part(record, "dataset").get("name")
    return f"Retriever trained on {_cell(name)}" if name else "Classifier-as-retriever"


def _facts(retriever: Retriever) -> Iterator[str]:
    record, backbone = retriever.record, retriever.encoder.backbone
    name = _public_name(retriever) or Path(backbone.config.name).name
    revision = f" at revision `{_cell(backbone.config.revision)}`" if backbone.config.revision else ""
    drawn = ", random weights" if backbone.config.random_weights else ""
    yield "| | |\n| --- | --- |\n"
    yield f"| backbone | {_cell(name)}{revision}{drawn} ({backbone.family}, {backbone.pooling} pooling, frozen) |\n"
    yield f"| backbone hash | `{backbone.hash}` |\n"
    adapter = retriever.adapter_config
    rank = f", rank {adapter.rank}" if adapter.kind in ("lowrank", "core") else ""
    yield f"| adapter | {adapter.kind}{rank}; {_count(retriever, 'adapter.'):,} trained numbers |\n"
    hidden = f", pre-classifier of width {retriever.head_config.hidden}" if retriever.head_config.hidden else ""
    yield f"| head | one row a document{hidden}; {_count(retriever, 'head.'):,} trained numbers |\n"
    yield f"| documents | {len(retriever.catalogue):,} |\n"
    dataset = _part(record, "dataset")
    if dataset:
        splits = [split for split in ("train", "validation", "test") if isinstance(dataset.get(split), int)]
        sizes = "".join(f", {dataset[split]:,} {split}" for split in splits)
        yield f"| training data | {_cell(dataset.get('name', 'unnamed'))}{sizes} |\n"
    yield from _training(record)


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    history = record.get("history")
    epochs = [epoch for epoch in history if isinstance(epoch, Mapping)] if isinstance(history, list) else []
    for stage in dict.fromkeys(epoch.get("stage") for epoch in epochs):
        own = [epoch for epoch in epochs if epoch.get("stage") == stage]
        loss, recall = (_figure(own[-1].get(name)) for name in ("loss", "validation_recall"))
        yield f"| {_cell(stage)} stage | epochs: {len(own)}, last loss {loss}, validation recall@1 {recall} |\n"
    federation = _part(record, "federation")
    if isinstance(federation.get("clients"), list) and isinstance(federation.get("rounds"), list):
        counts = f"{len(federation['clients'])} clients, {len(federation['rounds'])} rounds of averaging"
        yield f"| federation | {counts} |\n"
    for name, unit in (("seed", ""), ("seconds", " s of training")):
        if isinstance(record.get(name), int | float):
            yield f"| {name} | {record[name]}{unit} |\n"
    versions = _part(record, "versions")
    if versions:
        yield f"| versions | {', '.join(f'{_cell(name)} {_cell(number)}' for name, number in versions.items())} |\n"


def _table(rows: Mapping[str, Any]) -> str:
    measures = list(dict.fromkeys(measure for row in rows.values() if isinstance(row, Mapping) for measure in row))
    lines = [["", *map(_cell, measures)], ["---", *["---:"] * len(measures)]]
    lines += [[_cell(name), *(_estimate(_part(rows, name).get(measure)) for measure in measures)] for name in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _estimate(estimate: Any) -> str:
    if not isinstance(estimate, Mapping):
        return _figure(estimate)
    low, high = estimate.get("low"), estimate.get("high")
    interval = "" if low is None or high is None else f" [{_figure(low)}, {_figure(high)}]"
    return _figure(estimate.get("value")) + interval


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _count(retriever: Retriever, prefix: str) -> int:
    return sum(part.numel() for name, part in retriever.named_trainables() if name.startswith(prefix))


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, Mapping) else {}


def _cell(value: object) -> str:
    """A value on one line, with nothing that would end a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
