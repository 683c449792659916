"""The way down where changes are packed: who gets a change, who gets whole tensors, and what clients hold."""

import pytest
import torch

from caravan.config import FederationConfig
from caravan.errors import ConfigError, FederationError
from caravan.federation import flower, holding
from caravan.federation.flower import Failure, run_federation
from caravan.federation.rounds import Update
from toy_federation import SITES, assert_same_bits, toy_train

ROWS, WIDTH = 300, 256
WHOLE = ROWS * WIDTH * 4
PACKED = ROWS * WIDTH + ROWS * 4  # int8, and a scale a row


def start() -> dict[str, torch.Tensor]:
    return {"adapter": torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))}


class Run:
    """A run with what its clients received and what its rounds came to."""

    def __init__(self, local_train=toy_train, *, rounds=4, initial=None, clients=SITES, first_round=1, **settings):
        self.received, self.reports, self.models = {}, [], {}

        def train(client, tensors, number):
            self.received.setdefault((number, client), []).append({name: t.clone() for name, t in tensors.items()})
            return local_train(client, tensors, number)

        def on_round(report, model):
            self.reports.append(report)
            self.models[report.round] = model

        config = FederationConfig(**{"codec": "int8", **settings})
        self.tensors = run_federation(
            initial or start(),
            clients,
            train,
            rounds=rounds,
            settings=config,
            seed=5,
            first_round=first_round,
            on_round=on_round,
        )

    def down(self, number: int, client: str) -> str:
        """Which form of the tensors went to a client in a round, by its bytes."""
        sent = self.reports[number - 1].traffic[client]["down"]
        sizes = {"whole": WHOLE, "change": PACKED, "both": WHOLE + PACKED, "whole, twice": 2 * WHOLE, "nothing": 0}
        return min(sizes, key=lambda name: abs(sizes[name] - sent))

    def assert_all_received_the_same(self):
        for number in range(1, len(self.reports) + 1):
            first, *others = [each for (n, _), copies in self.received.items() if n == number for each in copies]
            for other in others:
                assert_same_bits(other, first)


def test_after_the_first_round_a_quarter_of_the_bytes_goes_down():
    run = Run()
    sent = [report.bytes_down for report in run.reports]
    assert sent[0] == pytest.approx(3 * WHOLE, rel=0.02)
    assert sent[1:] == [pytest.approx(3 * PACKED, rel=0.04)] * 3
    assert sum(sent[1:]) < 0.3 * 3 * sent[0]
    run.assert_all_received_the_same()


def test_the_servers_tensors_are_what_clients_hold_and_a_residual_of_less_than_a_step():
    run = Run()
    for number in (1, 2, 3):
        held, model = run.received[number + 1, "oslo"][0]["adapter"], run.models[number]["adapter"]
        begun = run.received[number, "oslo"][0]["adapter"]
        step = (held - begun).abs().amax(1, keepdim=True) / 127
        gap = (held - model).abs()
        assert bool((gap <= step * 1.5).all())
        assert float(gap.max()) > 0  # else there would be nothing to carry


def test_what_the_way_down_could_not_send_is_sent_later():
    change = torch.full((1, 64), 0.3)
    change[0, 0] = 127.0

    def train(client, tensors, number):
        return Update(client, {"row": tensors["row"] + change}, 1)

    run = Run(train, rounds=20, initial={"row": torch.zeros(1, 64)})
    assert float((run.received[20, "oslo"][0]["row"] - 19 * change).abs().max()) <= 2.02  # a step each way


def test_float32_changes_are_sent_without_loss():
    packed, whole = Run(codec="float32"), Run(codec="none")
    torch.testing.assert_close(packed.tensors["adapter"], whole.tensors["adapter"], rtol=0, atol=2e-6)
    assert_same_bits(packed.models[1], packed.received[2, "oslo"][0])  # nothing is left for a residual


def test_a_client_that_was_not_drawn_last_time_gets_whole_tensors():
    run = Run(rounds=8, clients_per_round=2)
    forms = set()
    for before, report in zip(run.reports, run.reports[1:], strict=False):
        for client in report.clients:
            form = "change" if client in before.clients else "whole"
            assert run.down(report.round, client) == form
            forms.add(form)
    assert forms == {"change", "whole"}
    run.assert_all_received_the_same()


def test_a_client_that_failed_gets_whole_tensors_next_time():
    def train(client, tensors, number):
        if (client, number) == ("lima", 2):
            raise ValueError("no data")
        return toy_train(client, tensors, number)

    run = Run(train)
    assert [run.down(number, "lima") for number in (1, 2, 3, 4)] == ["whole", "change", "whole", "change"]
    assert [run.down(number, "oslo") for number in (1, 2, 3, 4)] == ["whole", "change", "change", "change"]
    run.assert_all_received_the_same()


def test_a_client_that_is_asked_again_in_a_round_gets_whole_tensors():
    failed = []

    def train(client, tensors, number):
        if (client, number) == ("lima", 2) and not failed:
            failed.append(client)
            raise ValueError("no data")
        return toy_train(client, tensors, number)

    run = Run(train, min_clients=3)
    assert run.reports[1].retried == (Failure("lima", "ValueError: no data"),)
    assert [run.down(number, "lima") for number in (1, 2, 3)] == ["whole", "both", "change"]
    assert len(run.received[2, "lima"]) == 2
    run.assert_all_received_the_same()


@pytest.fixture
def restarted(monkeypatch):
    """Nodes that lose what they hold before a message: (round, place in SITES)."""
    lost: set[tuple[int, int]] = set()

    def forgetful(content, state):
        words = content.config_records["config"]
        if (words["round"], words["place"]) in lost:
            for name in list(state):
                del state[name]
        return holding.receive(content, state)

    monkeypatch.setattr(flower, "receive", forgetful)
    return lost


def test_a_node_that_lost_what_it_held_gets_whole_tensors_in_the_same_round(restarted):
    restarted.add((3, 1))
    run = Run(round_retries=0, min_clients=3)
    assert [run.down(number, "lima") for number in (1, 2, 3, 4)] == ["whole", "change", "both", "change"]
    assert all((report.failures, report.retried, report.clients) == ((), (), tuple(SITES)) for report in run.reports)
    run.assert_all_received_the_same()


def test_a_client_that_says_so_for_ever_is_a_failure_and_gets_whole_tensors_once_a_round(monkeypatch):
    def liar(content, state):
        words = content.config_records["config"]
        if words["place"] == 1 and words["round"] > 1:
            raise holding.LackingError("never")
        return holding.receive(content, state)

    monkeypatch.setattr(flower, "receive", liar)
    run = Run()
    assert [run.down(number, "lima") for number in (1, 2, 3, 4)] == ["whole", "both", "whole", "whole"]
    for report in run.reports[1:]:
        assert report.failures == (Failure("lima", "LackingError: never"),)
        assert report.clients == ("oslo", "pune")


def test_a_resumed_run_starts_with_whole_tensors_and_comes_nearly_to_the_same():
    whole = Run(rounds=4)
    resumed = Run(rounds=4, initial=whole.models[2], first_round=3)
    assert [report.round for report in resumed.reports] == [3, 4]
    assert_same_bits(resumed.received[3, "oslo"][0], whole.models[2])
    assert resumed.reports[0].bytes_down == pytest.approx(3 * WHOLE, rel=0.02)
    difference = float((resumed.tensors["adapter"] - whole.tensors["adapter"]).abs().max())
    assert 0 < difference < 0.1  # steps of rounding; the tensors have moved by more than 1
    assert float((whole.tensors["adapter"] - whole.models[2]["adapter"]).abs().max()) > 1


def test_equal_seeds_send_the_same_bits():
    assert_same_bits(Run().tensors, Run().tensors)


def test_the_clients_of_one_process_hold_one_copy_of_the_tensors(monkeypatch):
    held: dict[int, set[int]] = {}

    def watched(content, state):
        record = holding.receive(content, state)
        assert state.array_records["tensors"] is record
        held.setdefault(content.config_records["config"]["round"], set()).add(id(record))
        return record

    monkeypatch.setattr(flower, "receive", watched)
    Run(clients=[f"client {number}" for number in range(12)])
    assert [len(held[number]) for number in (1, 2, 3, 4)] == [1, 1, 1, 1]


def messages(content_of_round: int, run: str, tensors: dict[str, torch.Tensor], name: str = "arrays"):
    from flwr.app import ConfigRecord, RecordDict

    from caravan.federation.messages import encode

    words = {"codec": "float32", "sparse": [], "seed": 0, "run": run, "version": content_of_round}
    return RecordDict({name: encode(tensors), "config": ConfigRecord(words)})


@pytest.mark.parametrize(("run", "version"), [("another", 2), ("one", 3), ("one", 1)])
def test_a_change_of_another_run_or_round_is_not_applied(run, version):
    from flwr.app import RecordDict

    state = RecordDict()
    holding.receive(messages(1, "one", {"x": torch.zeros(2)}), state)
    with pytest.raises(holding.LackingError, match=f"it does not hold the tensors that round {version} changes"):
        holding.receive(messages(version, run, {"x/float32": torch.ones(2)}, "change"), state)


def test_another_run_starts_without_what_packing_has_left_over():
    from flwr.app import RecordDict

    state = RecordDict()
    update = Update("oslo", {"x": torch.tensor([1.0, 0.3, 0.2, 0.1])}, 1)
    for run, rounds in (("one", 1), ("two", 1)):
        content = messages(rounds, run, {"x": torch.zeros(4)})
        words = {**content.config_records["config"], "codec": "int8", "round": 1}
        arrays = holding.receive(content, state)
        assert "residual" not in state
        holding.pack_update(update, arrays, state, words)
        assert "residual" in state


def test_a_change_that_cannot_be_read_is_refused():
    from flwr.app import RecordDict

    state = RecordDict()
    holding.receive(messages(1, "odd", {"x": torch.zeros(2)}), state)
    with pytest.raises(FederationError, match="at most 8 are expected"):
        holding.receive(messages(2, "odd", {"x/float32": torch.zeros(3)}, "change"), state)
    with pytest.raises(FederationError, match=r"packed tensor x/float32 holds 1 numbers that are not finite"):
        holding.receive(messages(2, "odd", {"x/float32": torch.tensor([1.0, torch.inf])}, "change"), state)


def test_tensors_that_cannot_be_packed_are_refused_before_a_client_is_asked():
    with pytest.raises(
        FederationError, match=r'tensor adapter is torch.float64, federation.codec = "int8" packs float32'
    ):
        Run(initial={"adapter": torch.zeros(2, dtype=torch.float64)})


# Rows that did not change


def some_rows_change(client, tensors, number):
    """Every client moves rows of its own, and their biases; the others stay, bit for bit."""
    place, moved = SITES.index(client), {name: tensor.clone() for name, tensor in tensors.items()}
    rows = slice(10 * place, 10 * place + 10)
    generator = torch.Generator().manual_seed(10 * number + place)
    moved["head.rows"][rows] += torch.randn(10, WIDTH, generator=generator)
    moved["head.bias"][rows] += torch.randn(10, generator=generator)
    return Update(client, moved, 1 + place)


HEAD = {"head.rows": start()["adapter"], "head.bias": torch.zeros(ROWS), "head.log_scale": torch.tensor(3.0)}


@pytest.mark.parametrize(("codec", "step"), [("float32", 1e-5), ("float16", 5e-3), ("int8", 0.1)])
def test_rows_that_did_not_change_are_not_sent_and_the_result_is_the_same(codec, step):
    dense = Run(some_rows_change, initial=HEAD, codec=codec)
    sparse = Run(some_rows_change, initial=HEAD, codec=codec, sparse_rows=True)
    for name, tensor in dense.tensors.items():
        assert float((sparse.tensors[name] - tensor).abs().max()) <= step, name
    assert torch.equal(sparse.tensors["head.rows"][30:], HEAD["head.rows"][30:])
    for few, all_of_them in zip(sparse.reports, dense.reports, strict=True):
        assert few.bytes_up < 0.25 * all_of_them.bytes_up
        assert not few.failures
        if few.round > 1:
            assert few.bytes_down < 0.3 * all_of_them.bytes_down
    sparse.assert_all_received_the_same()


def test_the_rows_of_a_tensor_that_is_no_heads_are_all_sent():
    assert Run(sparse_rows=True).reports[1].bytes_up == pytest.approx(Run().reports[1].bytes_up, rel=0.01)


def test_rows_cannot_be_left_out_of_whole_tensors():
    with pytest.raises(
        ConfigError, match=r'federation.sparse_rows .* federation.codec is "none"; set codec to'
    ) as caught:
        Run(codec="none", sparse_rows=True)
    assert "\n" not in str(caught.value)
