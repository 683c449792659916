"""The scikit-learn classifier: scikit-learn's own checks as far as they go for texts, pipelines, searches, pickles."""

import copy
import io
import pickle
import string
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks, get_tags

from caravan.errors import ConfigError, DataError
from caravan.integrations.sklearn import CaravanClassifier
from toy_training import LETTERS, toy_examples

EXAMPLES = toy_examples(60)
TEXTS = [example.text for example in EXAMPLES]
LABELS = [example.doc_ids[0] for example in EXAMPLES]
MEANING = {label: " ".join(letters) for label, letters in LETTERS.items()}

# Those of scikit-learn's checks that need no numbers as X. `check_estimator` runs none for an estimator of texts.
CHECKS = [
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_mixin_order,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_set_params,
    estimator_checks.check_valid_tag_types,
]
# Those that fit on rows of numbers, which `Lettered` turns into words.
FITTING_CHECKS = [
    estimator_checks.check_classifiers_classes,
    estimator_checks.check_classifiers_one_label,
    estimator_checks.check_classifiers_regression_target,
    estimator_checks.check_dict_unchanged,
    estimator_checks.check_dont_overwrite_parameters,
    estimator_checks.check_estimators_fit_returns_self,
    estimator_checks.check_estimators_overwrite_params,
    estimator_checks.check_estimators_pickle,
    estimator_checks.check_estimators_unfitted,
    estimator_checks.check_fit2d_1feature,
    estimator_checks.check_fit_check_is_fitted,
    estimator_checks.check_fit_idempotent,
    estimator_checks.check_fit_score_takes_y,
    estimator_checks.check_methods_sample_order_invariance,
    estimator_checks.check_methods_subset_invariance,
    estimator_checks.check_requires_y_none,
    estimator_checks.check_supervised_y_2d,
    estimator_checks.check_supervised_y_no_nan,
]


class Lettered(CaravanClassifier):
    """The classifier for rows of numbers: each number is a letter."""

    def fit(self, X, y):  # noqa: N803
        return super().fit(_letters(X), y)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array = False, True
        return tags

    def predict_proba(self, X):  # noqa: N803
        return super().predict_proba(_letters(X))


def _letters(rows):
    return [" ".join(string.ascii_lowercase[int(value * 5) % 26] for value in np.ravel(row)) for row in rows]


@pytest.fixture
def settings(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    return {
        "backbone": backbone.config.name,
        "epochs": 8,
        "learning_rate": 0.01,
        "settings": {"backbone": {"max_tokens": 24}, "head": {"hidden": 0}},
    }


@pytest.fixture
def fitted(settings) -> CaravanClassifier:
    return CaravanClassifier(documents=MEANING, **settings).fit(TEXTS, LABELS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_scikit_learn_s_own_check_passes(check):
    check("CaravanClassifier", CaravanClassifier())


@pytest.mark.parametrize("check", FITTING_CHECKS, ids=lambda check: check.__name__)
def test_scikit_learn_s_own_check_of_fitting_passes(check, settings):
    check("Lettered", Lettered(**settings | {"epochs": 2}))


def test_its_tags_say_that_it_classifies_texts():
    tags = get_tags(CaravanClassifier())
    assert is_classifier(CaravanClassifier())
    assert (tags.input_tags.string, tags.input_tags.one_d_array, tags.input_tags.two_d_array) == (True, True, False)
    assert tags.target_tags.required


def test_it_learns_labels_and_gives_a_probability_for_each(fitted):
    assert fitted.classes_.tolist() == ["d0", "d1", "d2", "d3"]
    probabilities = fitted.predict_proba(TEXTS)
    assert probabilities.shape == (60, 4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (fitted.predict(TEXTS) == fitted.classes_[probabilities.argmax(axis=1)]).all()
    assert fitted.score(TEXTS, LABELS) > 0.6  # a quarter by chance
    assert fitted.fit(TEXTS, LABELS) is fitted


def test_columns_are_the_retriever_s_own_probabilities_by_label(fitted):
    (row,) = fitted.predict_proba(["a b c d"])
    hits = {hit.doc_id: hit.probability for hit in fitted.retriever_.search("a b c d", 4)}
    assert dict(zip(fitted.classes_, row, strict=True)) == pytest.approx(hits, abs=1e-6)


def test_the_meaning_of_a_label_is_its_document_and_else_the_label_itself(fitted, settings):
    assert [document.text for document in fitted.retriever_.catalogue] == [
        " ".join(letters) for letters in list(LETTERS.values())[:4]
    ]
    bare = CaravanClassifier(**settings).fit(TEXTS, [f"about_{label}" for label in LABELS])
    assert [document.text for document in bare.retriever_.catalogue] == ["about d0", "about d1", "about d2", "about d3"]


def test_arrays_series_and_lists_give_the_same_and_labels_keep_their_type(settings, fitted):
    numbers = [int(label[1:]) for label in LABELS]
    meaning = {int(label[1:]): words for label, words in MEANING.items()}
    expected = fitted.predict_proba(TEXTS)
    for texts, labels in (
        (np.array(TEXTS), np.array(numbers)),
        (np.array(TEXTS, dtype=object), numbers),
        (pd.Series(TEXTS, index=range(100, 160)), pd.Series(numbers, index=range(100, 160))),
    ):
        other = CaravanClassifier(documents=meaning, **settings).fit(texts, labels)
        np.testing.assert_allclose(other.predict_proba(texts), expected, atol=1e-5)
        assert other.predict(texts).dtype.kind == "i"
        assert other.classes_.tolist() == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_and_a_random_state_is_taken(settings):
    def probabilities(state):
        return CaravanClassifier(random_state=state, **settings).fit(TEXTS, LABELS).predict_proba(TEXTS[:5])

    np.testing.assert_array_equal(probabilities(3), probabilities(3))
    np.testing.assert_array_equal(probabilities(np.int64(3)), probabilities(3))
    assert (probabilities(3) != probabilities(4)).any()
    drawn = [probabilities(np.random.RandomState(5)) for _ in range(2)]
    np.testing.assert_array_equal(*drawn)


def packages_of(pickled: bytes) -> set[str]:
    """Whose classes and functions a pickle calls for."""
    packages = set()

    class Recording(pickle.Unpickler):
        def find_class(self, module, name):
            packages.add(module.partition(".")[0])
            return super().find_class(module, name)

    Recording(io.BytesIO(pickled)).load()
    return packages


def test_pickles_and_copies_predict_the_same(fitted):
    expected = fitted.predict_proba(TEXTS)
    for other in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        np.testing.assert_array_equal(other.predict_proba(TEXTS), expected)
        assert other.get_params() == fitted.get_params()
        assert other.classes_.tolist() == fitted.classes_.tolist()
    assert packages_of(pickle.dumps(fitted)) == {"caravan", "numpy"}  # no object of torch; numpy's is `classes_`
    with pytest.raises(NotFittedError):
        pickle.loads(pickle.dumps(clone(fitted))).predict(TEXTS)


def test_a_pickle_cannot_write_outside_its_folder(fitted, tmp_path, monkeypatch):
    state = fitted.__getstate__()
    target = tmp_path / "outside"
    state["retriever_files"] |= {str(target): b"x", "../../escaped": b"x"}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a"))
    (tmp_path / "a").mkdir()
    CaravanClassifier().__setstate__(state)
    assert not target.exists()
    assert list(Path(tmp_path).rglob("escaped")) == []


def test_it_is_searched_cross_validated_and_piped(settings):
    search = GridSearchCV(CaravanClassifier(**settings), {"epochs": [0, 8]}, cv=2, error_score="raise")
    search.fit(TEXTS, LABELS)
    assert search.best_params_ == {"epochs": 8}
    assert search.best_estimator_.get_params()["epochs"] == 8
    texts_of = FunctionTransformer(lambda rows: [row["text"] for row in rows])
    piped = make_pipeline(texts_of, CaravanClassifier(documents=MEANING, **settings))
    scores = cross_val_score(piped, [{"text": text} for text in TEXTS], LABELS, cv=2, error_score="raise")
    assert scores.min() > 0.4  # a quarter by chance


def test_wrong_use_is_refused(settings, fitted):
    with pytest.raises(NotFittedError):
        CaravanClassifier().predict(TEXTS)
    for wrong in ([[text] for text in TEXTS], np.array([TEXTS]), pd.DataFrame({"text": TEXTS}), "one text"):
        with pytest.raises((ValueError, DataError)):
            fitted.predict(wrong)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        CaravanClassifier(**settings).fit(TEXTS, LABELS[:-1])
    with pytest.raises(ValueError, match="continuous"):
        CaravanClassifier(**settings).fit(TEXTS, np.linspace(0, 1, len(TEXTS)))
    with pytest.raises(DataError, match="empty"):
        fitted.predict(["", "a"])
    with pytest.raises(ConfigError, match=r"training\.mode = 'both'"):
        CaravanClassifier(mode="both").fit(TEXTS, LABELS)
    with pytest.raises(ConfigError, match="unknown setting"):
        CaravanClassifier(settings={"training": {"speed": 3}}).fit(TEXTS, LABELS)
