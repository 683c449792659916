"""What the server does while it waits for its nodes: an end of waiting for what can no longer come."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from caravan.federation import network


@dataclass
class Grid:
    """Three nodes; each look at the answers is one step of `steps`, which changes what there is to see."""

    steps: list
    answers: dict
    starts: dict

    def push_messages(self, messages):
        return [f"to {message.metadata.dst_node_id}" for message in messages]

    def get_nodes(self):
        if self.steps:
            self.steps.pop(0)(self)
        return [SimpleNamespace(node_id=node, last_activated_at=start) for node, start in self.starts.items()]

    def pull_messages(self, questions):
        answer = self.answers.pop(*questions, None)
        if isinstance(answer, Exception):
            raise answer
        return [] if answer is None else [answer]


@pytest.fixture
def ask(monkeypatch):
    monkeypatch.setattr(network, "_LOOK_SECONDS", 0.0)

    def ask(*steps, timeout=None):
        grid = Grid([lambda grid: None, *steps], {}, {1: "a", 2: "a", 3: "a"})
        messages = [SimpleNamespace(metadata=SimpleNamespace(dst_node_id=node)) for node in (1, 2, 3)]
        return sorted(network._Watched(grid).send_and_receive(iter(messages), timeout=timeout))

    return ask


def answer(*nodes):
    return lambda grid: grid.answers.update({f"to {node}": f"from {node}" for node in nodes})


def start(node, when):
    return lambda grid: grid.starts.update({node: when})


def test_all_answers_are_waited_for_in_whatever_order_they_come(ask):
    assert ask(answer(3), lambda grid: None, answer(1), answer(2)) == ["from 1", "from 2", "from 3"]


def test_a_node_that_was_started_anew_is_not_waited_for(ask):
    assert ask(answer(1, 3), start(2, "b")) == ["from 1", "from 3"]


def test_what_its_predecessor_had_answered_counts(ask):
    def both(grid):
        start(2, "b")(grid)
        answer(2)(grid)

    assert ask(answer(1, 3), both) == ["from 1", "from 2", "from 3"]


def test_a_node_that_is_away_is_left_to_flower_which_answers_for_it(ask):
    def away(grid):
        del grid.starts[2]

    def error(grid):
        grid.answers["to 2"] = "an error for 2"

    assert ask(answer(1, 3), away, lambda grid: None, error) == ["an error for 2", "from 1", "from 3"]


@pytest.mark.parametrize("error", [ValueError("no JSON"), KeyError("no dtype"), TypeError("no text")])
def test_an_answer_that_cannot_be_read_does_not_end_the_others(ask, error):
    def spoil(grid):
        grid.answers["to 2"] = error

    assert ask(spoil, answer(1, 3)) == ["from 1", "from 3"]


def test_other_faults_are_not_hidden(ask):
    def fail(grid):
        grid.answers["to 2"] = ConnectionError("no server")

    with pytest.raises(ConnectionError):
        ask(fail)


def test_what_comes_too_late_is_left(ask):
    assert ask(answer(1), timeout=0.05) == ["from 1"]
