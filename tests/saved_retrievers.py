"""Retrievers with random numbers, as if trained, and ways to spoil their folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from caravan.config import HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.model.backbone import Backbone
from caravan.model.retriever import Retriever

QUERIES = ["where is my parcel", "i forgot it!", "refund"]
DOCUMENTS = (
    Document("parcel", "track a parcel", "Tracking", {"url": "https://example.org/1"}),
    Document("login", "reset the password \N{GREEK SMALL LETTER GAMMA}"),
    Document("money", "get a refund", "Refunds"),
)
FILES = {"README.md", "adapter.safetensors", "config.json", "documents.jsonl", "head.safetensors", "training.json"}
RECORD = {
    "dataset": {"name": "helpdesk", "train": 1200, "validation": 130, "test": 320, "documents": 3},
    "history": [
        {"stage": "head", "epoch": 0, "loss": 0.5, "validation_recall": None, "seconds": 1.0},
        {"stage": "head", "epoch": 1, "loss": 0.25, "validation_recall": 0.75, "seconds": 1.0},
    ],
    "metrics": {
        "head": {"recall@1": {"value": 0.98765, "low": 0.975, "high": 0.99}},
        "BM25": {"recall@1": {"value": 0.5}},
    },
    "metrics_split": "test",
    "versions": {"torch": "2.13.0"},
    "seed": 7,
    "seconds": 12.5,
    "privacy": "Trained without differential privacy.",
    "federation": {"clients": [{"name": "a"}, {"name": "b"}], "rounds": [{}, {}, {}]},
}


def make_retriever(backbone: Backbone, documents=DOCUMENTS, *, seed: int = 0, adapter=None, head=None) -> Retriever:
    """A retriever all of whose trainable numbers are random, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    rows, head = torch.zeros(len(documents), backbone.hidden_width), head or HeadConfig(hidden=0)
    retriever = Retriever.start(backbone, Catalogue(documents), rows, adapter=adapter, head=head)
    with torch.no_grad():
        for _, parameter in retriever.named_trainables():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    retriever.record = dict(RECORD)
    return retriever


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def change_tensors(folder: Path, file: str, change) -> None:
    state = load_file(folder / file)
    change(state)
    save_file(state, folder / file)
