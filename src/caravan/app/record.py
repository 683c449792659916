"""What a training writes down of itself: settings, data, history, versions, and what its privacy is worth."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from caravan.app.wording import describe_wording
from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.federation.central_noise import CentralNoise
from caravan.model.backbone import Backbone
from caravan.training.budget import Budget, as_values

_NOT_OF_THE_RESULT = ("data", "evaluation", "deployment")  # the words themselves are hashed
_VERSIONS = ("caravan", "torch", "transformers", "safetensors", "flwr")
_NO_PRIVACY = (
    "Trained without differential privacy: the tensors can reveal training queries to whoever holds them. "
    "Keep them as private as the queries."
)

_OF_NODES = (
    'Trained on nodes with privacy.mode = "{mode}": each node added its own noise before sending, and keeps its '
    "own ledger, where its epsilon stands; the epsilons that nodes let the server know are in federation.rounds."
)


def run_fingerprint(dataset: Dataset, config: Config, backbone: str) -> str:
    """Name what must be the same for a snapshot to be taken up: settings that change the result, words, frozen model.

    Args:
        dataset: what is trained on.
        config: all settings.
        backbone: hash of the frozen model.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_RESULT}
    settings["training"] = {**settings["training"], "checkpoint_seconds": None}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(backbone.encode())
    digest.update(dataset.catalogue.fingerprint.encode())
    for examples in (dataset.train, dataset.validation):
        digest.update(len(examples).to_bytes(8))  # where train ends and validation begins
        for example in examples:
            digest.update(json.dumps([example.text, example.doc_ids, dict(example.columns)]).encode())
    return digest.hexdigest()


def training_record(
    dataset: Dataset,
    config: Config,
    backbone: Backbone,
    *,
    passages: int,
    history: Sequence[Mapping[str, Any]],
    seconds: float,
    budgets: Mapping[str, Budget],
    central_noise: CentralNoise | None,
    rates: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write a training down as plain values.

    Args:
        dataset: what was trained on.
        config: all settings.
        backbone: the frozen model.
        passages: how many were trained on beside the queries.
        history: one record an epoch; none of a federated training.
        seconds: of training.
        budgets: by owner, of a private training; none of another.
        central_noise: what the server added, in mode "client-level".
        rates: how those that were "auto" came about, by stage.
    """
    sizes = {"train": len(dataset.train), "validation": len(dataset.validation), "test": len(dataset.test)}
    guarantees = {owner: budget.facts() for owner, budget in budgets.items()}
    record = {
        "config": config.to_dict(),
        "dataset": {
            "name": dataset.name,
            "documents": len(dataset.catalogue),
            **sizes,
            "passages": passages,
            "skipped": dataset.skipped,
        },
        "wording": describe_wording(backbone, dataset, private=config.privacy.mode != "none"),
        "history": list(history),
        "seed": config.seed,
        "seconds": round(seconds, 3),
        "versions": {"python": platform.python_version(), **_installed(_VERSIONS)},
        "privacy": privacy_statement(config, budgets, central_noise),
    }
    if rates:
        record["learning_rates"] = {stage: dict(choice) for stage, choice in rates.items()}
    if central_noise is not None:
        record["guarantees"] = {"clients": as_values(central_noise.guarantee)}
    if budgets:
        record["guarantees"] = {owner or "all": facts for owner, facts in guarantees.items()}
    return record


def privacy_statement(config: Config, budgets: Mapping[str, Budget], central_noise: CentralNoise | None) -> str:
    """What a training promises, in words; of owners' guarantees the worst: each has its own, a reader may be any."""
    if central_noise is not None:
        return central_noise.statement()
    if config.privacy.mode == "none":
        return _NO_PRIVACY
    if not budgets:
        return _OF_NODES.format(mode=config.privacy.mode)
    worst = max(budgets, key=lambda owner: _epsilon(budgets[owner]))
    others = f" This is client {worst}'s, the weakest of {len(budgets)} clients'." if len(budgets) > 1 else ""
    return budgets[worst].statement() + others


def shown_settings(config: Mapping[str, Any], data: str, documents: int) -> dict[str, Any]:
    """Those settings of a training that its readers look for first; folders by their names alone.

    Args:
        config: all settings as plain values.
        data: what the data set is called.
        documents: how many there are.
    """
    training, federation, mode = config["training"], config["federation"], config["training"]["mode"]
    stages = ("head", "adapter") if mode == "adapter" else ("head",)
    shown = {
        "data": Path(data).name or data,
        "documents": documents,
        "backbone": Path(config["backbone"]["name"]).name,
        "mode": mode,
        **{f"{stage} epochs": training[stage]["epochs"] for stage in stages},
        **{f"{stage} batch": training[stage]["batch_size"] for stage in stages},
        **{f"{stage} learning rate": training[stage]["learning_rate"] for stage in stages},
        "seed": config["seed"],
    }
    if federation["clients"] or federation["partition"] == "column":
        shown |= {"rounds": federation["rounds"], "strategy": federation["strategy"]}
    if config["privacy"]["mode"] != "none":
        shown["privacy"] = config["privacy"]["mode"]
    return shown


def _epsilon(budget: Budget) -> float:
    return (budget.paper().proved if budget.config.mode == "paper" else budget.plan.guarantee).epsilon


def _installed(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
