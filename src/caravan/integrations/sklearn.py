"""A scikit-learn classifier: `fit` on texts and labels, `predict`, `predict_proba`; for pipelines and grid searches."""

from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from caravan.app.learning import train
from caravan.config import Config, changed, config_from_dict
from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.data.records import Document, Example
from caravan.data.splits import cut_validation
from caravan.integrations.found import missing
from caravan.storage import load, save

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import Tags, assert_all_finite, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d
except ModuleNotFoundError as error:
    raise missing(error, extra="sklearn") from None

_FILES = "retriever_files"  # of a pickle: what `caravan.save` wrote, by name


class CaravanClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of texts: one row of the head a label, started from the labels' words or their examples.

    Pickling keeps the files of `caravan.save` (safetensors and JSON), not objects; the frozen model is found again by
    its name. As with every pickle, load only what you trust.

    Attributes:
        classes_: the labels, sorted; columns of `predict_proba` are in their order.
        retriever_: the trained `caravan.Retriever`, for `search` and `caravan.save`.
    """

    def __init__(
        self,
        *,
        documents: Mapping[Any, str] | None = None,
        mode: str = "head",
        epochs: int | None = None,
        learning_rate: float | str | None = None,
        backbone: str = "minilm",
        settings: Mapping[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        """Remember the settings, unchecked, as scikit-learn wants it.

        Args:
            documents: what each label means, in words; None: the label itself.
            mode: "head" (seconds) or "adapter" (minutes).
            epochs: of the mode's own stage; None: caravan's default.
            learning_rate: likewise.
            backbone: "minilm", a model folder, or a Hugging Face id.
            settings: further settings, nested as in `caravan train --print-config`; they give way to those above.
            random_state: a seed; None: caravan's default, so that the same call gives the same result.
        """
        self.documents = documents
        self.mode = mode
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.backbone = backbone
        self.settings = settings
        self.random_state = random_state

    def fit(self, X: Sequence[str], y: Sequence[Hashable]) -> "CaravanClassifier":  # noqa: N803
        """Train on texts and their labels.

        Raises:
            CaravanError: a setting, a text or a label cannot be used.
            ValueError: X and y are of different lengths, or y is no list of labels.
        """
        check_consistent_length(X, y)
        labels = column_or_1d(y, warn=True)
        assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
        self.classes_, rows = np.unique(labels, return_inverse=True)
        config = self._config()
        documents = [Document(str(label), self._words(label)) for label in self.classes_]
        examples = [Example(text, (documents[row].doc_id,)) for text, row in zip(_texts(X), rows, strict=True)]
        learnt, held = cut_validation(examples, config.data.validation_fraction, seed=config.seed)
        self.retriever_ = train(Dataset("labels", Catalogue(documents), learnt, held, ()), config)
        return self

    def predict(self, X: Sequence[str]) -> NDArray[Any]:  # noqa: N803
        """Give the most probable label of each text: (B,)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def predict_proba(self, X: Sequence[str]) -> NDArray[np.float32]:  # noqa: N803
        """Give the probability of each label for each text: float32 (B, C), rows sum to 1.

        Raises:
            NotFittedError: `fit` was not called.
            DataError: a text is empty or no text.
        """
        check_is_fitted(self)
        scores = torch.cat([batch.cpu() for batch in self.retriever_.score_batches(_texts(X))])
        return scores.softmax(dim=1).numpy()

    def _config(self) -> Config:
        given = {
            "training.mode": self.mode,
            f"training.{self.mode}.epochs": self.epochs,
            f"training.{self.mode}.learning_rate": self.learning_rate,
            "backbone.name": self.backbone,
            "seed": self.random_state,
        }
        if self.random_state is not None and not isinstance(self.random_state, Integral):
            given["seed"] = int(check_random_state(self.random_state).randint(2**31 - 1))
        changes = {key: value for key, value in given.items() if value is not None}
        return config_from_dict(changed(self.settings or {}, changes), source="CaravanClassifier")

    def _words(self, label: Any) -> str:
        if self.documents is not None and label in self.documents:
            return self.documents[label]
        return str(label).replace("_", " ").strip() or str(label)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        kept: Any = super().__getstate__()
        state: dict[str, Any] = dict(kept)
        if "retriever_" in state:
            with TemporaryDirectory() as place:
                folder = save(state.pop("retriever_"), Path(place) / "retriever")
                state[_FILES] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state.pop(_FILES, None)
        super().__setstate__(state)
        if files is not None:
            with TemporaryDirectory() as folder:
                for name, content in files.items():
                    (Path(folder) / Path(name).name).write_bytes(content)
                self.retriever_ = load(folder)


def _texts(X: Any) -> list[str]:  # noqa: N803
    # A table of one column would silently be read as its column's name.
    if getattr(X, "ndim", 1) != 1 or isinstance(X, str):
        raise ValueError(
            "X must be a list (or a one-dimensional array) of texts; give one column, such as table['text']"
        )
    return [str(text) if isinstance(text, np.str_) else text for text in X]
