"""The command `caravan compare communication`."""

from typing import Annotated

import typer

from caravan.app.command import Config, Json, Set, print_json, work
from caravan.app.options import build_config


def communication(
    data: Annotated[
        str | None,
        typer.Argument(help="helpdesk, a file, a folder, or a Hugging Face data set id: its documents size the head."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Also train by each method on the same clients, for its recall@1 (hours).")
    ] = False,
    config: Config = None,
    setting: Set = None,
    rank: Annotated[int | None, typer.Option(help="Of the lowrank and the core adapter.")] = None,
    backbone: Annotated[str | None, typer.Option(help="minilm, a model folder, or a Hugging Face id.")] = None,
    clients: Annotated[int | None, typer.Option(help="With --train: this many clients; 3 if left out.")] = None,
    rounds: Annotated[int | None, typer.Option(help="With --train: rounds of averaging.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="With --train: passes over the data beside the head's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same result.")] = None,
    as_json: Json = False,
) -> None:
    """Count the bytes of a round: full, lowrank and core adapter, LoRA, and full fine-tuning, by codec.

    Counting needs no training and takes seconds, for the backbone and for TinyLlama-1.1B and Llama-3.2-3B. Training
    is asked for with --train: nine trainings on the backbone, each with the same clients, rounds, epochs and head
    stage, with codec none (float32) and, for the adapters, int8. LoRA needs peft (extra "compare").

    caravan compare communication
    caravan compare communication data/ --rank 64 --json
    caravan compare communication data/ --train --epochs 2 --rounds 2
    """
    settings = build_config(
        config,
        setting,
        {
            "seed": seed,
            "data.path": data,
            "adapter.rank": rank,
            "backbone.name": backbone,
            "federation.clients": clients,
            "federation.rounds": rounds,
            "training.adapter.epochs": epochs,
        },
    )
    for option, value in {"--clients": clients, "--rounds": rounds, "--epochs": epochs}.items():
        if value is not None and not train:
            raise typer.BadParameter("says how to train; add --train", param_hint=option)
    from caravan.app.communication import Communication
    from caravan.app.display import print_communication
    from caravan.data.dataset import Dataset

    with work(as_json) as bars:
        dataset = Dataset.from_config(settings.data, seed=settings.seed)
        found = Communication(dataset, settings, report=bars)
        trained = [found.train(method, codec) for method, codec in found.trainings()] if train else []
    if as_json:
        print_json(found.summary(trained))
    else:
        print_communication(found, trained)
        if train and not found.has_peft:
            typer.echo("LoRA was not trained: peft not installed (pip install 'caravan[compare]').")
