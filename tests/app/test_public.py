"""The public names as a reader of the manual uses them: from a file to a search in eight lines."""

import csv
import dataclasses

import pytest

import caravan
from caravan import (
    Catalogue,
    Config,
    Dataset,
    Document,
    Example,
    Hit,
    config_from_dict,
    evaluate,
    load,
    read_config,
    save,
)
from caravan.errors import CaravanError
from tiny_models import make_tiny_bert
from toy_training import CATALOGUE, assert_same_bits, toy_examples


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a file of queries and settings for a tiny backbone."""
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, seed in (("queries", 0), ("held-out", 1)):
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            rows = [(example.text, example.doc_ids[0]) for example in toy_examples(40, seed=seed)]
            csv.writer(stream).writerows([("text", "label"), *rows])
    with (tmp_path / "faq.csv").open("w", encoding="utf-8", newline="") as stream:
        rows = [(document.doc_id, document.text, f"Letters {document.doc_id}") for document in CATALOGUE]
        csv.writer(stream).writerows([("doc_id", "text", "title"), *rows])
    (tmp_path / "small.toml").write_text(
        f"""
[backbone]
name = '{make_tiny_bert(tmp_path / "bert")}'
max_tokens = 24
[training.head]
epochs = 2
[training.adapter]
epochs = 2
""",
        encoding="utf-8",
    )
    return tmp_path


EIGHT_LINES = """
from caravan import Dataset, evaluate, load, read_config, save, train
dataset = Dataset.read("queries.csv", documents="faq.csv", test="held-out.csv")
retriever = train(dataset, read_config("small.toml"))
print(evaluate(retriever, dataset)["recall@1"])
save(retriever, "faq-retriever")
for hit in load("faq-retriever").search("a b c d", k=3):
    print(hit.rank, hit.doc_id, round(hit.probability, 3), hit.title)
"""


@pytest.mark.parametrize("how", ["train", "federate"])
def test_from_a_file_to_a_search_in_at_most_eight_lines(here, capsys, how):
    lines = EIGHT_LINES.replace("train", how)
    assert lines.strip().count("\n") < 8
    exec(compile(lines, "the manual", "exec"), {})
    measured, *hits = capsys.readouterr().out.splitlines()
    assert measured.startswith("Estimate(value=0.")
    assert [line.split()[0] for line in hits] == ["1", "2", "3"]
    assert len({line.split()[1] for line in hits} & {f"d{row}" for row in range(5)}) == 3
    assert all(line.endswith(f"Letters {line.split()[1]}") for line in hits)
    assert ("federation" in load("faq-retriever").record) == (how == "federate")


def test_words_that_are_already_in_memory_need_no_file(here):
    catalogue = Catalogue([Document("hours", "m o n"), Document("price", "e u r", title="Price")])
    train = [Example("m n", ("hours",)), Example("u r", ("price",)), Example("o m", ("hours",))]
    dataset = Dataset("mine", catalogue, train, (), ())
    settings = config_from_dict({**read_config("small.toml").to_dict(), "training": {"mode": "head"}})
    retriever = caravan.train(dataset, settings)
    first, second = retriever.search("o n")
    assert isinstance(first, Hit)
    assert {first.doc_id, second.doc_id} == {"hours", "price"}
    assert first.probability + second.probability == pytest.approx(1)
    assert evaluate(retriever, [Example("e r", ("price",))], bootstrap=0)["recall@5"].value == 1
    save(retriever, "mine")
    assert_same_bits(load("mine").trainable_state(), retriever.trainable_state())


def test_settings_are_read_frozen_and_every_fault_is_one_kind_of_error(here):
    config = read_config("small.toml")
    assert isinstance(config, Config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    dataset = Dataset.read("queries.csv", documents="faq.csv")
    faults = [
        lambda: read_config("none.toml"),
        lambda: config_from_dict({"sed": 3}),
        lambda: Dataset.read("none.csv"),
        lambda: load("none"),
        lambda: evaluate(caravan.train(dataset, config), []),
    ]
    for fault in faults:
        with pytest.raises(CaravanError) as caught:
            fault()
        assert "\n" not in str(caught.value)
