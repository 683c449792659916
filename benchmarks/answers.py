"""How often the extractive answer cites a gold document: one saved retriever, validation and (once) test queries."""

import argparse
import json

from caravan import Dataset, load
from caravan.app.answers.answering import Answering
from caravan.app.answers.evidence import calibrated
from caravan.app.experiment import recorded_settings


def main() -> None:
    """Answer every query of a split and print shares as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder that `caravan train` wrote")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    given = parser.parse_args()
    retriever = load(given.model)
    config = recorded_settings(retriever, given.model, {})
    examples = getattr(Dataset.from_config(config.data, seed=config.seed), given.split)
    answering = Answering(retriever, calibration=calibrated(given.model, retriever))
    answers = [answering.answer(example.text) for example in examples]
    found = [
        bool({one.doc_id for one in answer.found} & set(example.doc_ids))
        for answer, example in zip(answers, examples, strict=True)
    ]
    known = [answer.known for answer in answers]
    right = sum(hit and answered for hit, answered in zip(found, known, strict=True))
    first = sum(
        answer.known and answer.citations[0].doc_id in example.doc_ids
        for answer, example in zip(answers, examples, strict=True)
    )
    result = {
        "split": given.split,
        "questions": len(examples),
        "answered": sum(known) / len(examples),
        "right_of_answered": right / max(1, sum(known)),
        "right_of_all": right / len(examples),
        "first_citation_right_of_answered": first / max(1, sum(known)),
        "gold_among_found_of_all": sum(found) / len(examples),
        "citations_an_answer": sum(len(answer.citations) for answer in answers) / max(1, sum(known)),
        "mean_confidence": sum(answer.confidence for answer in answers) / len(answers),
        "calibration": vars(answering.weigher.calibration),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
