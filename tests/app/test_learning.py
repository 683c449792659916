"""Training from settings: what the head starts from, central training, clients, the record."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

import caravan
from caravan.app.learning import Experiment, federate, train
from caravan.config import FederationConfig
from caravan.data.splits import Selection
from caravan.errors import ConfigError, DataError, FederationError
from caravan.model.adapter import IdentityAdapter
from caravan.model.encoder import Encoder
from toy_experiments import (
    DATASET,
    Raising,
    share_found,
    toy_dataset,
    with_wrong_documents,
    with_wrong_queries,
)
from toy_training import UNSEEN, Log, StoppedError, assert_same_bits, differ, largest_difference

both_modes = pytest.mark.parametrize("mode", ["head", "adapter"])
DEALS = {
    "iid": ({"clients": 3}, ["client-0", "client-1", "client-2"]),
    "dirichlet": ({"clients": 3, "partition": "dirichlet"}, ["client-0", "client-1", "client-2"]),
    "column": ({"partition": "column", "column": "site"}, ["east", "north", "west"]),
}


def vectors(backbone, texts):
    return Encoder(backbone, IdentityAdapter(backbone.embedding_width)).encode(list(texts))


def as_json(value):
    return json.loads(json.dumps(value, allow_nan=False))


# Central


@both_modes
def test_training_learns_the_task_and_moves_what_the_mode_says(settings, prepare, mode):
    dataset = with_wrong_documents(toy_dataset(120, noise=0.2, test=100))  # else the start already finds most
    untrained = prepare(settings(mode=mode), dataset).retriever
    start, before = untrained.trainable_state(), share_found(untrained, dataset.test)
    retriever = train(dataset, settings(mode=mode, epochs=8, rate=0.1))
    head = {"head.rows", "head.bias", "head.log_scale"}
    assert differ(retriever.trainable_state(), start) == head | ({"adapter.matrix"} if mode == "adapter" else set())
    assert share_found(retriever, dataset.test) > before + 0.3
    stages = ["head"] * 8 + (["adapter"] * 8 if mode == "adapter" else [])
    assert [record["stage"] for record in retriever.record["history"]] == stages


@both_modes
def test_the_same_seed_gives_the_same_bits_from_the_public_functions_too(settings, mode):
    first, again, other = (
        train(DATASET, settings(mode=mode, epochs=1, seed=seed)).trainable_state() for seed in (13, 13, 14)
    )
    assert_same_bits(first, again)
    assert "head.rows" in differ(first, other)
    ours, theirs = (
        federate(DATASET, settings(mode=mode, epochs=1, federation={"clients": 2})).trainable_state() for _ in range(2)
    )
    assert_same_bits(ours, theirs)


def test_the_adapter_stage_goes_on_from_the_head_stages_solution(settings, prepare):
    alone = prepare(settings(mode="head")).run().trainable_state()
    seen = {}
    prepare(settings(mode="adapter")).run(lambda stage, now, seconds: seen.update({stage: now.trainable_state()}))
    assert list(seen) == ["head", "adapter"]
    assert {name for name in alone if not torch.equal(alone[name], seen["head"][name])} == set()
    assert "adapter.matrix" in differ(seen["head"], seen["adapter"])


def test_training_does_not_look_at_the_settings_of_clients(settings):
    config = settings(mode="head", epochs=1)
    central = train(DATASET, config)
    asked = train(DATASET, replace(config, federation=FederationConfig(clients=3)))
    assert_same_bits(asked.trainable_state(), central.trainable_state())
    assert "federation" not in asked.record


# What the head starts from


def test_centroids_are_the_start_where_the_documents_texts_are_poor(settings, prepare, backbone):
    dataset = with_wrong_documents(DATASET)
    experiment = prepare(settings(head={"start": "auto"}), dataset)
    rows = experiment.retriever.head.rows.detach()
    queries = vectors(backbone, [example.text for example in dataset.train])
    for row in range(4):
        own = torch.tensor([example.doc_ids == (f"d{row}",) for example in dataset.train])
        torch.testing.assert_close(rows[row], normalize(queries[own].mean(dim=0), dim=0))
    documents = vectors(backbone, [document.content for document in dataset.catalogue])
    torch.testing.assert_close(rows[UNSEEN], documents[UNSEEN])
    worse = prepare(settings(head={"start": "documents"}), dataset).retriever
    assert share_found(experiment.retriever, dataset.validation) > share_found(worse, dataset.validation)


def test_documents_are_the_start_where_the_queries_tell_less(settings, prepare, backbone):
    dataset = with_wrong_queries(DATASET)
    documents = vectors(backbone, [document.content for document in dataset.catalogue])
    started = {
        start: prepare(settings(head={"start": start}), dataset).retriever
        for start in ("auto", "documents", "centroids")
    }
    torch.testing.assert_close(started["auto"].head.rows.detach(), documents)
    assert_same_bits(started["auto"].trainable_state(), started["documents"].trainable_state())
    found = {start: share_found(retriever, dataset.validation) for start, retriever in started.items()}
    assert found["auto"] > found["centroids"]


@pytest.mark.parametrize("case", ["clients", "no validation"])
def test_without_validation_or_with_clients_the_start_is_the_documents(settings, prepare, backbone, case):
    dataset = with_wrong_documents(DATASET)
    clients = {"clients": 3} if case == "clients" else {}
    dataset = dataset if clients else replace(dataset, validation=())
    retriever = prepare(settings(head={"start": "auto"}, federation=clients), dataset).retriever
    documents = vectors(backbone, [document.content for document in dataset.catalogue])
    torch.testing.assert_close(retriever.head.rows.detach(), documents)


@pytest.mark.parametrize("clients", [0, 3])
@both_modes
def test_documents_without_training_queries_keep_their_row(settings, prepare, backbone, mode, clients):
    retriever = prepare(settings(mode=mode, epochs=2, federation={"clients": clients, "rounds": 2})).run()
    state = retriever.trainable_state()
    documents = vectors(backbone, [document.content for document in DATASET.catalogue])
    assert torch.equal(state["head.rows"][UNSEEN], documents[UNSEEN])
    assert float(state["head.bias"][UNSEEN]) == 0
    assert not torch.isclose(state["head.rows"][:UNSEEN], documents[:UNSEEN]).all(dim=1).any()


# Clients


@both_modes
@pytest.mark.parametrize("deal", DEALS)
def test_clients_that_do_not_pool_their_queries_learn_the_task(settings, prepare, mode, deal):
    federation, names = DEALS[deal]
    dataset = with_wrong_documents(toy_dataset(120, noise=0.2, test=100))  # else the start already finds most
    config = settings(mode=mode, epochs=3, batch_size=16, rate=0.1, federation={**federation, "rounds": 3})
    before = share_found(prepare(config, dataset).retriever, dataset.test)
    retriever = federate(dataset, config)
    assert share_found(retriever, dataset.test) > before + 0.3
    record = retriever.record["federation"]
    assert [client["name"] for client in record["clients"]] == names
    assert sum(client["examples"] for client in record["clients"]) == 120
    stages = ["head", "adapter"] if mode == "adapter" else ["head"]
    assert [(each["stage"], each["round"]) for each in record["rounds"]] == [
        (stage, number) for stage in stages for number in (1, 2, 3)
    ]
    for each in record["rounds"]:
        assert list(each["clients"]) == names
        assert list(each["examples"]) == [client["examples"] for client in record["clients"]]
        assert not each["failures"]
    last = record["rounds"][-1]["validation_recall"]
    assert last == pytest.approx(share_found(retriever, dataset.validation))


def test_sites_get_the_queries_that_were_asked_there(settings, prepare):
    experiment = prepare(settings(federation={"partition": "column", "column": "site"}))
    assert [(shard.name, len(shard.examples)) for shard in experiment.shards] == [
        ("east", 24),
        ("north", 16),
        ("west", 8),
    ]
    assert all({example.columns["site"] for example in shard.examples} == {shard.name} for shard in experiment.shards)


@pytest.mark.parametrize("config", [None, {}, {"partition": "dirichlet"}])
def test_three_clients_is_what_federate_means_when_nothing_is_said(settings, monkeypatch, config):
    prepared = []
    monkeypatch.setattr(Experiment, "__init__", lambda self, dataset, config, **options: prepared.append(config))
    monkeypatch.setattr(Experiment, "run", lambda self: None)
    federate(DATASET, None if config is None else settings(federation=config))
    assert prepared[0].federation.clients == 3
    assert prepared[0].federation.partition == (config or {}).get("partition", "iid")


@both_modes
def test_one_client_and_one_round_equal_central_training_bit_for_bit(settings, prepare, mode):
    central = prepare(settings(mode=mode)).run()
    alone = prepare(settings(mode=mode, federation={"clients": 1, "rounds": 1})).run()
    assert_same_bits(alone.trainable_state(), central.trainable_state())
    assert differ(alone.trainable_state(), prepare(settings(mode=mode)).retriever.trainable_state())


@both_modes
def test_three_clients_dealt_at_random_reach_what_central_training_reaches(settings, prepare, mode):
    dataset = toy_dataset(120, noise=0.3, test=200)
    shared = {"mode": mode, "epochs": 6}
    start = share_found(prepare(settings(**shared), dataset).retriever, dataset.test)
    central = share_found(prepare(settings(**shared), dataset).run(), dataset.test)
    federation = {"clients": 3, "rounds": 3}
    federated = share_found(prepare(settings(**shared, federation=federation), dataset).run(), dataset.test)
    assert federated == pytest.approx(central, abs=0.05)
    assert federated > start + 0.1


def test_rounds_are_never_more_than_epochs_to_divide(settings, prepare):
    record = prepare(settings(mode="head", epochs=2, federation={"clients": 2, "rounds": 5})).run().record
    assert len(record["federation"]["rounds"]) == 2


@pytest.mark.parametrize("hold", [False, True])
def test_clients_that_send_and_get_int8_learn_nearly_as_well(settings, prepare, hold):
    dataset = toy_dataset(120, noise=0.3, test=200)
    shared = {"mode": "adapter", "epochs": 6, "head": {"hold_unseen": hold}}

    def share(**federation):
        config = settings(**shared, federation={"clients": 3, "rounds": 6, **federation})
        return share_found(prepare(config, dataset).run(), dataset.test)

    whole, packed = share(), share(codec="int8", sparse_rows=hold)
    assert packed == pytest.approx(whole, abs=0.03)
    assert packed > share_found(prepare(settings(**shared), dataset).retriever, dataset.test) + 0.1


def test_what_goes_over_the_wire_is_counted(settings, prepare):
    retriever = prepare(settings(mode="adapter", epochs=2, federation={"clients": 3, "rounds": 2})).run()
    state = retriever.trainable_state()
    head = sum(state[name].nbytes for name in state if name.startswith("head."))
    both = sum(tensor.nbytes for tensor in state.values())
    rounds = retriever.record["federation"]["rounds"]
    assert [each["stage"] for each in rounds] == ["head", "head", "adapter", "adapter"]
    for each, tensors in zip(rounds, (head, head, both, both), strict=True):
        names = len(state) if each["stage"] == "adapter" else 3
        for direction in ("up", "down"):
            clients = each["traffic"].values()
            assert each[f"bytes_{direction}"] == sum(counts[direction] for counts in clients)
            # Names, forms and words around each tensor; the words of a real order are a few hundred bytes more.
            assert all(tensors < counts[direction] < tensors + 700 * names + 700 for counts in clients)


def test_a_client_whose_training_fails_is_reported_and_the_others_go_on(settings, prepare):
    config = settings(mode="head", epochs=2, federation={"partition": "column", "column": "site", "rounds": 2})
    log = Raising("round 1/2, west", OSError("the disk of west\nis full"))
    retriever = prepare(config, report=log).run()
    first, second = retriever.record["federation"]["rounds"]
    assert list(first["failures"]) == [{"client": "west", "reason": "OSError: the disk of west is full"}]
    assert (list(first["clients"]), list(first["examples"])) == (["east", "north"], [24, 16])
    assert list(second["clients"]) == ["east", "north", "west"]
    assert not second["failures"]


def test_a_client_that_always_fails_leaves_what_the_others_learn_without_it(settings, prepare):
    config = settings(epochs=2, federation={"partition": "column", "column": "site", "rounds": 2})
    failing = prepare(config, report=lambda progress: 1 / ("west" not in progress.task)).run()
    others = replace(DATASET, train=[example for example in DATASET.train if example.columns["site"] != "west"])
    assert_same_bits(failing.trainable_state(), prepare(config, others).run().trainable_state())


def test_all_clients_failing_is_an_error_that_names_their_reasons(settings, prepare):
    config = settings(mode="head", epochs=2, rate=1e30, max_gradient_norm=None, federation={"clients": 3, "rounds": 2})
    with pytest.raises(FederationError, match=r"round 1: 0 of 3 clients .*client-0, client-1, client-2: TrainingError"):
        prepare(config).run()


def test_fewer_usable_clients_than_asked_for_is_an_error(settings, prepare):
    config = settings(mode="head", epochs=1, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    with pytest.raises(FederationError, match=r"2 of 3 clients .*min_clients is 3 \(client-1: StoppedError"):
        prepare(config, report=Raising("round 1/1, client-1: training", StoppedError("no"))).run()


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_round_that_is_kept_is_the_last_or_the_best_on_validation(settings, prepare, keep):
    # So large a rate that validation goes up and down.
    config = settings(mode="head", epochs=6, rate=0.3, federation={"clients": 3, "rounds": 6, "keep": keep})
    retriever = prepare(config).run()
    federation = retriever.record["federation"]
    recalls = [each["validation_recall"] for each in federation["rounds"]]
    assert max(recalls) > recalls[-1]  # else the test would prove nothing
    kept = federation["kept_rounds"]["head"]
    assert kept == (6 if keep == "last" else recalls.index(max(recalls)) + 1)
    assert share_found(retriever, DATASET.validation) == pytest.approx(recalls[kept - 1])


def test_the_adapter_stage_starts_from_the_head_stages_kept_round(settings, prepare):
    federation = {"clients": 3, "rounds": 6, "keep": "best"}
    seen = {}
    record = (
        prepare(settings(mode="adapter", epochs=6, rate=0.3, federation=federation))
        .run(lambda stage, now, seconds: seen.update({stage: share_found(now, DATASET.validation)}))
        .record["federation"]
    )
    for stage in ("head", "adapter"):
        recalls = [each["validation_recall"] for each in record["rounds"] if each["stage"] == stage]
        assert seen[stage] == pytest.approx(max(recalls))
        assert record["kept_rounds"][stage] == recalls.index(max(recalls)) + 1


def test_a_drawn_part_of_the_clients_trains_each_round(settings, prepare):
    federation = {"clients": 6, "clients_per_round": 2, "rounds": 4}
    rounds = prepare(settings(mode="head", epochs=4, federation=federation)).run().record["federation"]["rounds"]
    asked = [tuple(each["asked"]) for each in rounds]
    assert [tuple(each["clients"]) for each in rounds] == asked
    assert {len(drawn) for drawn in asked} == {2}
    assert len(set(asked)) > 1


def test_fedprox_holds_clients_nearer_to_the_rounds_start_than_fedavg(settings, prepare):
    def state(**federation):
        return prepare(settings(mode="head", epochs=2, federation={"clients": 3, "rounds": 1, **federation})).run()

    start = prepare(settings(mode="head")).retriever.trainable_state()
    free, held = (run.trainable_state() for run in (state(), state(strategy="fedprox", proximal_mu=30.0)))
    assert 0 < largest_difference(held, start) < largest_difference(free, start)


@pytest.mark.parametrize(
    ("parts", "error", "told"),
    [
        ({"federation": {"clients": 2, "clients_per_round": 3}}, ConfigError, "clients_per_round is 3, there are 2"),
        ({"federation": {"clients": 4, "strategy": "krum"}}, ConfigError, "needs 5 usable updates a round"),
        ({"head": {"start": "centroids"}, "federation": {"clients": 3}}, ConfigError, r'head\.start = "centroids"'),
        (
            {"head": {"start": "centroids"}, "federation": {"partition": "column", "column": "site"}},
            ConfigError,
            r'head\.start = "centroids"',
        ),
        ({"federation": {"clients": 2, "min_clients": 3}}, ConfigError, r"min_clients is 3, there are 2 clients"),
        ({"federation": {"clients": 49}}, DataError, "48 training examples cannot be dealt to 49 clients"),
        ({"federation": {"partition": "column", "column": "town"}}, DataError, "no value in the column 'town'"),
    ],
)
def test_what_clients_refuse_is_refused_before_any_work(settings, tmp_path, parts, error, told):
    log = Log()
    with pytest.raises(error, match=told) as caught:
        federate(DATASET, settings(**parts), report=log, checkpoint=tmp_path / "snapshots")
    assert "\n" not in str(caught.value)
    assert log.told == []
    assert not (tmp_path / "snapshots").exists()


def test_the_best_round_cannot_be_kept_without_validation(settings, prepare):
    dataset = replace(DATASET, validation=())
    with pytest.raises(ConfigError, match=r'federation\.keep = "best" chooses by validation queries'):
        prepare(settings(federation={"clients": 3, "keep": "best"}), dataset)


# The record


@pytest.mark.parametrize("clients", [0, 3])
def test_the_record_is_plain_json_and_says_how_it_came_about(settings, prepare, clients):
    config = settings(epochs=2, federation={"clients": clients, "rounds": 2})
    dataset = replace(DATASET, skipped=3)
    record = prepare(config, dataset).run().record
    assert as_json(record)["config"] == as_json(config.to_dict())
    assert record["dataset"] == {
        "name": "letters",
        "documents": 5,
        "train": 48,
        "validation": 20,
        "test": 30,
        "passages": 0,
        "skipped": 3,
    }
    assert record["seed"] == 13
    assert record["seconds"] > 0
    assert "without differential privacy" in record["privacy"]
    assert record["versions"]["caravan"] == caravan.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "safetensors", "flwr"} <= record["versions"].keys()
    assert [(each["stage"], each["epoch"]) for each in record["history"]] == (
        [] if clients else [(stage, epoch) for stage in ("head", "adapter") for epoch in (0, 1)]
    )
    assert ("federation" in record) == bool(clients)


def test_a_centrally_trained_records_history_ends_with_the_retrievers_own_recall(settings, prepare):
    retriever = prepare(settings()).run()
    last = retriever.record["history"][-1]
    assert last["validation_recall"] == pytest.approx(share_found(retriever, DATASET.validation))
    assert 0 < last["loss"] < retriever.record["history"][0]["loss"]


@pytest.mark.parametrize("clients", [0, 2])
def test_examples_that_are_only_looked_up_train_like_those_in_memory(settings, prepare, clients):
    def view(examples):
        return Selection(examples, range(len(examples)))

    dataset = replace(DATASET, train=view(DATASET.train), validation=view(DATASET.validation))
    config = settings(mode="head", epochs=1, federation={"clients": clients})
    assert_same_bits(prepare(config, dataset).run().trainable_state(), prepare(config).run().trainable_state())
