"""The command `caravan personalise`: a shared head, moved towards one client's own queries, on its machine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from caravan.app.display import Bars
    from caravan.federation.personal import Personal


def personalise(
    model: Annotated[
        str, typer.Argument(help="The shared retriever: a folder that `caravan train` or `submit` wrote.")
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="This client's queries; they stay here.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the personal retriever.")],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. training.head.epochs=10. Repeatable."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output instead of text.")
    ] = False,
) -> None:
    """Move a shared head towards one client's own queries, as far as its held-out queries say that it helps.

    caravan personalise shared --data our-queries.csv --out ours
    caravan search ours "flat after 10 km??"
    """
    from caravan.app.display import Bars
    from caravan.app.options import parse_settings

    changes = parse_settings(setting)
    with Bars(quiet=as_json) as bars:
        personal = _run(model, data, out, changes, bars)
    recalls = {f"{share:g}": recall for share, recall in personal.recalls.items()}
    if as_json:
        typer.echo(json.dumps({"model": out, "share": personal.share, "recalls": recalls}, indent=2))
        return
    typer.echo(f"recall@1 on {personal.held_out} held-out queries, by share of the local head:")
    for share, recall in recalls.items():
        typer.echo(f"  {share:>5}  {100 * recall:5.1f} %{'  kept' if float(share) == personal.share else ''}")
    typer.echo(f"Saved to {out}. It is this client's own: do not send it.")


def _run(model: str, data: str, out: str, changes: dict[str, object], bars: "Bars") -> "Personal":
    from caravan.app.experiment import recorded_settings
    from caravan.data.dataset import Dataset
    from caravan.federation.personal import personalise as move_head
    from caravan.storage import check_destination, load, save
    from caravan.training.features import FeatureStore, default_cache

    check_destination(out)
    retriever = load(model)
    config = recorded_settings(retriever, model, changes)
    catalogue = str(Path(model) / "documents.jsonl")  # the data's own would be another order of rows
    files = replace(config.data, path=data, documents=catalogue, validation=None, test=None, validation_fraction=0.0)
    examples = Dataset.from_config(files, seed=config.seed).train
    store = FeatureStore(default_cache())
    personal = move_head(retriever, examples, config.training, seed=config.seed, store=store, report=bars)
    save(retriever, out)
    return personal
