"""Old weights or new ones: who answers more held-out questions first, and the rule by which the new ones are taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

from caravan.app.comparison import rank_queries
from caravan.app.feedback.lessons import Question
from caravan.data.records import Example
from caravan.model.retriever import Retriever
from caravan.training.evaluation import Estimate, Ranking, measure
from caravan.training.features import FeatureStore
from caravan.training.progress import Report

CHANCE = 0.05  # a loss that chance alone would bring less often than this is taken for a loss
_VALIDATION, _RIGHT, _WRONG = "validation queries", "marked right", "marked wrong alone"


@dataclass(frozen=True)
class Tally:
    """How old and new did on one set of questions.

    Attributes:
        name: which.
        questions: how many.
        old: of them the old weights answer so many first.
        new: and the new ones so many.
        won: the new ones do and the old ones do not.
        lost: the other way round.
        even: whether the questions were chosen without looking at either; those marked wrong alone were chosen because
            the old weights failed, so that any others would do better on them.
    """

    name: str
    questions: int
    old: int
    new: int
    won: int
    lost: int
    even: bool = True

    @property
    def chance(self) -> float:
        """How often chance alone would lose as many of the questions that only one answers (one-sided sign test)."""
        differ = self.won + self.lost
        return sum(comb(differ, count) for count in range(self.lost, differ + 1)) / 2**differ


@dataclass(frozen=True)
class Verdict:
    """What the comparison found.

    Attributes:
        tallies: on validation queries, held-back queries with a right mark, and those with wrong marks alone; of these
            those that there are.
        measures: recall@k, MRR@10, ... on the validation queries, by "old" and "new"; none where there are none.
    """

    tallies: tuple[Tally, ...]
    measures: Mapping[str, Mapping[str, Estimate]]

    @property
    def objection(self) -> str | None:
        """Why the new weights are not taken; None where they are.

        They are taken where they answer no fewer questions first than the old ones, all even sets together, and where
        no set alone speaks against them by more than chance explains.
        """
        even = [tally for tally in self.tallies if tally.even]
        if not even:
            return "nothing to compare on: there are neither validation queries nor held-back right marks"
        old, new = sum(tally.old for tally in even), sum(tally.new for tally in even)
        if new < old:
            total = sum(tally.questions for tally in even)
            return f"the new weights answer {new} of {total} questions first, the old ones {old}"
        for tally in self.tallies:
            if tally.lost > tally.won and tally.chance < CHANCE:
                return f"on {tally.name} the new weights lose {tally.lost} and win {tally.won}, more than by chance"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "tallies": [asdict(tally) for tally in self.tallies],
            "measures": {
                which: {name: asdict(estimate) for name, estimate in values.items()}
                for which, values in self.measures.items()
            },
            "objection": self.objection,
        }


def judge(
    old: Retriever,
    new: Retriever,
    validation: Sequence[Example],
    questions: Sequence[Question],
    *,
    store: FeatureStore,
    bootstrap: int = 1000,
    seed: int = 13,
    report: Report | None = None,
) -> Verdict:
    """Compare two retrievers on the same documents.

    Args:
        old: what is served.
        new: what may take its place; its catalogue is the same.
        validation: queries that neither was trained on.
        questions: marked ones that neither was trained on.
        store: where vectors are kept.
        bootstrap: resamples behind each interval; 0: none.
        seed: of the resampling.
        report: called as the encoding goes on.
    """
    tallies: list[Tally] = []
    measures: dict[str, dict[str, Estimate]] = {}

    def ranked(retriever: Retriever, texts: Sequence[str], name: str) -> Ranking:
        return rank_queries(retriever, texts, store, report, task=f"comparing: {name} weights")

    def count(name: str, texts: Sequence[str], right: Callable[[int, str], bool], *, even: bool = True) -> None:
        rankings = {which: ranked(retriever, texts, which) for which, retriever in (("old", old), ("new", new))}
        first = {
            which: [right(place, new.catalogue.ids[int(row)]) for place, row in enumerate(ranking.rows[:, 0])]
            for which, ranking in rankings.items()
        }
        pairs = list(zip(first["old"], first["new"], strict=True))
        tallies.append(
            Tally(
                name,
                len(texts),
                sum(first["old"]),
                sum(first["new"]),
                won=sum(after and not before for before, after in pairs),
                lost=sum(before and not after for before, after in pairs),
                even=even,
            )
        )
        if name == _VALIDATION:
            gold = [new.catalogue.gold_rows(example) for example in validation]
            for which, ranking in rankings.items():
                measures[which] = measure(ranking, gold, bootstrap=bootstrap, seed=seed)

    if validation:
        texts = [example.text for example in validation]
        count(_VALIDATION, texts, lambda place, doc_id: doc_id in validation[place].doc_ids)
    for name, own in (
        (_RIGHT, [question for question in questions if question.right]),
        (_WRONG, [question for question in questions if not question.right]),
    ):
        if own:
            texts = [question.query for question in own]
            count(name, texts, lambda place, doc_id, own=own: own[place].answered(doc_id), even=name == _RIGHT)
    return Verdict(tuple(tallies), measures)
