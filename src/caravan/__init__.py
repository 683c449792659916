"""caravan: train a classifier-as-retriever on a frozen small language model, on one machine or across many.

The public names are loaded when first used, so that `import caravan` and `caravan --help` stay quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caravan.app.comparison import evaluate
    from caravan.app.learning import federate, train
    from caravan.config import Config, config_from_dict, read_config
    from caravan.data.dataset import Catalogue, Dataset
    from caravan.data.records import Document, Example, Hit
    from caravan.errors import CaravanError
    from caravan.federation.personal import personalise
    from caravan.model.retriever import Retriever
    from caravan.storage import load, save

__version__ = version("caravan")

_HOME = {
    "CaravanError": "caravan.errors",
    "Catalogue": "caravan.data.dataset",
    "Config": "caravan.config",
    "Dataset": "caravan.data.dataset",
    "Document": "caravan.data.records",
    "Example": "caravan.data.records",
    "Hit": "caravan.data.records",
    "Retriever": "caravan.model.retriever",
    "config_from_dict": "caravan.config",
    "evaluate": "caravan.app.comparison",
    "federate": "caravan.app.learning",
    "load": "caravan.storage",
    "personalise": "caravan.federation.personal",
    "read_config": "caravan.config",
    "save": "caravan.storage",
    "train": "caravan.app.learning",
}

__all__ = [
    "CaravanError",
    "Catalogue",
    "Config",
    "Dataset",
    "Document",
    "Example",
    "Hit",
    "Retriever",
    "config_from_dict",
    "evaluate",
    "federate",
    "load",
    "personalise",
    "read_config",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'caravan' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
