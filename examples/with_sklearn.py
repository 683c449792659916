"""Search over settings of a text classifier with scikit-learn: `python examples/with_sklearn.py`."""

import pickle

from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV

from caravan import Dataset
from caravan.integrations.sklearn import CaravanClassifier

# Which topic is a question about? The label of its article says so.
data = Dataset.read("helpdesk")
topics = {document.doc_id: document.metadata["topic"] for document in data.catalogue}
texts, labels = zip(*[(example.text, topics[example.doc_ids[0]]) for example in data.train], strict=True)
test_texts, test_labels = zip(*[(example.text, topics[example.doc_ids[0]]) for example in data.test], strict=True)

# Vectors of the frozen model are computed once and kept, so each further training takes a second or two.
search = GridSearchCV(CaravanClassifier(epochs=5, random_state=0), {"learning_rate": [1e-4, 1e-3]}, cv=2)
search.fit(texts, labels)
print("best:", search.best_params_)
print(f"accuracy on the test questions: {accuracy_score(test_labels, search.predict(test_texts)):.3f}")

classifier = pickle.loads(pickle.dumps(search.best_estimator_))
(probabilities,) = classifier.predict_proba(["my bird went dark mid ride"])
for topic, probability in sorted(zip(classifier.classes_, probabilities, strict=True), key=lambda pair: -pair[1])[:3]:
    print(f"{probability:.0%}  {topic}")
