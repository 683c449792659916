"""Races of learning rates, with trainings whose outcomes are worked out by hand."""

from collections import Counter

import pytest

from caravan.app.race import fold_of, race
from caravan.data.records import Example
from caravan.errors import TrainingError
from caravan.training.checkpoint import Checkpoint
from caravan.training.progress import Progress
from toy_training import Log, StoppedError

QUERIES = [Example(f"query {number}", ("d0",)) for number in range(400)]
TWICE = [*QUERIES, *QUERIES[:100]]  # a hundred of them asked twice
TRIED = [1e-3, 3.162e-4, 3.162e-3, 1e-4, 1e-2, 3.162e-2]  # around 1e-3, the nearest first


class Trials:
    """Trainings that find a share of what is held out: every query whose number, mod 100, is below it."""

    def __init__(self, shares, *, stop_after=None, size=400):
        self.shares, self.stop_after, self.size, self.ran, self.held_out = shares, stop_after, size, [], []

    def __call__(self, train, held_out, rate, report):
        assert not {example.text for example in train} & {example.text for example in held_out}
        assert len(train) + len(held_out) == self.size
        for done in range(1, 11):
            report(Progress("training the head", done, 10, loss=0.5))
            report(Progress("evaluating", done, 10))  # not of the race
        if len(self.ran) == self.stop_after:
            raise StoppedError
        self.ran.append(rate)
        self.held_out += [example.text for example in held_out]
        if self.shares[rate] is None:
            raise TrainingError("the loss is nan")
        return [int(example.text.split()[1]) % 100 < self.shares[rate] for example in held_out]


def raced(trials, *, rate=1e-3, examples=QUERIES, seed=1, kept=None, report=None):
    return race(rate, examples, trials, seed=seed, kept=kept, report=report)


def test_the_rate_that_finds_most_wins_and_those_far_behind_leave_early():
    trials = Trials(dict(zip(TRIED, [80, 81, 20, 79, 0, 10], strict=True)))
    found = raced(trials)
    assert found.rate == 3.162e-4
    assert found.found[3.162e-4] == (324, 400)  # all folds; 81 of each hundred
    assert found.found[1e-3] == (320, 400)
    for rate in (3.162e-3, 1e-2, 3.162e-2):  # dozens of queries behind, and none ahead: two standard errors and more
        assert trials.ran.count(rate) == 1
        assert found.found[rate][1] < 130
    first = {example.text for example in QUERIES if fold_of(example.text, 1) == 0}
    asked = Counter(trials.held_out)
    assert all(asked[text] == 6 for text in first)  # once a rate, and fewer rates in the other folds
    assert all(2 <= asked[example.text] <= 3 for example in QUERIES if example.text not in first)
    assert found.to_dict()["held_out"][0] == {"rate": 1e-3, "found": 320, "of": 400}


def test_of_equals_the_nearest_to_where_it_began_wins():
    assert raced(Trials(dict.fromkeys(TRIED, 50))).rate == 1e-3
    assert raced(Trials(dict(zip(TRIED, [40, 50, 40, 50, 50, 50], strict=True)))).rate == 3.162e-4


def test_a_rate_at_which_training_diverges_leaves_and_with_all_of_them_there_is_no_winner():
    trials = Trials(dict(zip(TRIED, [50, 50, None, 60, None, None], strict=True)))
    found = raced(trials)
    assert found.rate == 1e-4
    assert set(found.found) == {1e-3, 3.162e-4, 1e-4}
    assert found.to_dict()["diverged"] == [3.162e-3, 1e-2, 3.162e-2]
    log = Log()
    assert raced(Trials(dict.fromkeys(TRIED)), report=log) is None
    assert log.told[-1].done == log.told[-1].total


def test_a_rate_that_diverges_later_has_not_won_with_what_it_found_before():
    class Late(Trials):
        def __call__(self, train, held_out, rate, report):
            if rate == 3.162e-4 and rate in self.ran:
                self.ran.append(rate)
                raise TrainingError("the loss is nan")
            return super().__call__(train, held_out, rate, report)

    found = raced(Late(dict(zip(TRIED, [50, 55, 50, 50, 50, 50], strict=True))))
    assert found.rate == 1e-3
    assert 3.162e-4 not in found.found
    assert found.diverged == (3.162e-4,)


@pytest.mark.parametrize("examples", [QUERIES[:39], [*QUERIES[:39], *QUERIES[:39]], QUERIES[:1] * 400])
def test_a_handful_of_different_queries_is_no_race(examples):
    trials = Trials(dict.fromkeys(TRIED, 50))
    assert raced(trials, examples=examples) is None
    assert not trials.ran


def test_queries_with_the_same_text_are_held_out_together():
    trials = Trials(dict.fromkeys(TRIED, 50), size=len(TWICE))  # says itself that no text is on both sides
    assert raced(trials, examples=TWICE).found[1e-3] == (250, 500)  # the first hundred count twice: 2 x 50 + 3 x 50


def test_of_a_large_fold_no_more_is_ranked_than_is_enough(monkeypatch):
    monkeypatch.setattr("caravan.app.race._ENOUGH", 30)

    class Capped(Trials):
        def __call__(self, train, held_out, rate, report):
            assert len(held_out) == 30
            assert 270 < len(train) < 330
            self.size = len(train) + 30
            return super().__call__(train, held_out, rate, report)

    assert raced(Capped(dict(zip(TRIED, range(50, 56), strict=True)))).found[1e-3][1] == 30


def test_many_queries_need_no_more_than_the_first_folds(monkeypatch):
    monkeypatch.setattr("caravan.app.race._ENOUGH", 150)
    found = raced(Trials(dict(zip(TRIED, range(50, 56), strict=True))))
    assert 150 <= found.found[1e-3][1] < 300


def test_the_same_text_is_always_held_out_with_itself_and_folds_are_of_about_a_size():
    folds = [fold_of(example.text, 3) for example in QUERIES]
    assert folds == [fold_of(example.text, 3) for example in QUERIES]
    assert folds != [fold_of(example.text, 4) for example in QUERIES]
    assert all(70 < count < 130 for count in Counter(folds).values())  # 100 each, 9 of standard deviation


@pytest.mark.parametrize("after", [0, 1, 8])
def test_a_killed_race_goes_on_where_it_stood(tmp_path, after):
    shares = dict(zip(TRIED, [80, 81, 20, 79, 0, 10], strict=True))
    whole = Trials(shares)
    expected = raced(whole)
    kept = Checkpoint(tmp_path / "race.safetensors", "mine")
    first, second = Trials(shares, stop_after=after), Trials(shares)
    with pytest.raises(StoppedError):
        raced(first, kept=kept)
    assert raced(second, kept=kept) == expected
    assert first.ran + second.ran == whole.ran


def test_the_bar_never_falls_and_ends_full():
    log = Log()
    raced(Trials(dict(zip(TRIED, [80, 81, 20, 79, 0, 10], strict=True))), report=log)
    done = [progress.done for progress in log.told]
    assert done == sorted(done)
    assert len(set(done)) > 100  # it moves within a training, too
    assert done[-1] == log.told[-1].total
    assert {progress.task for progress in log.told} == {"choosing the head's learning rate on held-out queries"}
