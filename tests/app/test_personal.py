"""`caravan personalise`: a client's own file and a shared retriever in, a retriever of its own out."""

import json

from caravan.storage import load
from command_line import listing, run, write_table
from toy_training import toy_examples

OTHERS = {"d0": "d1", "d1": "d2", "d2": "d3", "d3": "d0"}


def write_odd_client(path, count=60):
    """Queries that mean another document here than everywhere else; only some documents occur."""
    examples = toy_examples(count, seed=5, noise=0.1)
    write_table(path, ("text", "label"), [(example.text, OTHERS[example.doc_ids[0]]) for example in examples])


def test_a_saved_retriever_becomes_a_clients_own_and_stays_as_it_was_itself(workshop, here):
    before = listing(workshop.model)
    write_odd_client(here / "own.csv")
    outcome = run("personalise", workshop.model, "--data", "own.csv", "-o", "own", "--set", "training.head.epochs=8")
    assert outcome.code == 0, outcome.err
    assert "recall@1 on 12 held-out queries" in outcome.out
    assert outcome.out.count("kept") == 1
    assert "Saved to own. It is this client's own: do not send it." in outcome.out
    assert listing(workshop.model) == before
    shared, own = load(workshop.model), load("own")
    assert own.catalogue.fingerprint == shared.catalogue.fingerprint
    assert own.record["personal"]["share"] > 0
    assert own.record["personal"]["held_out"] == 12
    assert "metrics" not in own.record


def test_the_answer_in_json(workshop, here):
    write_odd_client(here / "own.csv")
    outcome = run("personalise", workshop.model, "--data", "own.csv", "-o", "own", "--json")
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    assert answer["model"] == "own"
    assert set(answer["recalls"]) == {"0", "0.25", "0.5", "0.75", "1"}
    assert answer["recalls"][f"{answer['share']:g}"] == max(answer["recalls"].values())


def test_too_few_queries_and_strange_documents_are_one_line(workshop, here):
    write_odd_client(here / "few.csv", 5)
    outcome = run("personalise", workshop.model, "--data", "few.csv", "-o", "own")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("DataError: 5 queries of different text are too few")
    write_table(here / "strange.csv", ("text", "label"), [("a b c", "unheard-of")] * 20)
    outcome = run("personalise", workshop.model, "--data", "strange.csv", "-o", "own")
    assert outcome.code == 1
    assert "unheard-of" in outcome.err
    assert not (here / "own").exists()
