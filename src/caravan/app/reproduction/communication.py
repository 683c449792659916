"""Communication: bytes of a round by what is trained, by clients, and the time they take on slow and fast links."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from caravan.app.charts import Chart, Series
from caravan.app.communication import Communication, SentCodec
from caravan.app.payload import Method, Payload
from caravan.app.reproduction.federations import simulate
from caravan.app.reproduction.findings import Findings, Table
from caravan.app.reproduction.frame import Bench, counts
from caravan.app.reproduction.trials import seeds_text, spread
from caravan.data.dataset import Dataset

_SENT_COLUMNS = (
    *("trained beside the head", "codec", "bytes beside the head", "of LoRA", "with the head", "of full adapter"),
    *("measured up", "measured down", "seconds of a client", "recall@1 %", "over seeds"),
)
_SENT_NOTE = (
    "A client and round of the adapter stage. Bytes beside and with the head: the numbers alone, from their shapes. "
    "Measured: content of the messages as serialised, mean over clients and rounds; down in a stage's first round come "
    "whole tensors. Seconds of a client: of the whole stage by clients and rounds, so with the server's share. Recall "
    "of one ranking of the test split a training. LoRA has rank 8, on queries and values (qv) or every linear layer."
)
_LARGER_COLUMNS = (
    "model",
    "trained beside the head",
    "codec",
    "bytes with the head",
    "of full adapter",
    "of the model",
)
_CLIENT_COLUMNS = ("clients", "up a round", "down a round", "both, by client")
_CLIENT_NOTE = (
    "Measured: one round of the adapter stage with a full adapter, as serialised, all clients together: what passes "
    "through the server."
)
_LINK_NOTE = (
    "Arithmetic, not measured on a wire: (bytes down + bytes up) x 8 / bits per second, two latencies (the message to "
    "the client and its answer), and the client's measured seconds of a round. Each client has a link of its own and "
    "all are alike, so a round takes as long as for one; neither TCP's start nor loss is in it."
)


@dataclass(frozen=True)
class Link:
    """A client's line to the server.

    Attributes:
        bits: a second, each way.
        latency_ms: one way.
    """

    bits: float
    latency_ms: float

    def seconds(self, down: float, up: float) -> float:
        """How long bytes to a client and its bytes back are on their way: one message each."""
        return 8 * (down + up) / self.bits + 2 * self.latency_ms / 1000

    def __str__(self) -> str:
        """For headings."""
        rate = f"{self.bits / 1e6:g} Mbit/s" if self.bits >= 1e6 else f"{self.bits / 1e3:g} kbit/s"
        return f"{rate}, {self.latency_ms:g} ms"


@dataclass(frozen=True)
class Sent:
    """What one method sends, over seeds.

    Attributes:
        method, codec: as in `Communication`.
        parts: `Trained.to_dict`'s values, one a seed.
        clients: how many trained.
    """

    method: Method
    codec: SentCodec
    parts: Sequence[Mapping[str, Any]]
    clients: int

    @property
    def key(self) -> str:
        """As in the settings."""
        return f"{self.method}/{self.codec}"

    @property
    def name(self) -> str:
        """For rows and legends."""
        return self.method if self.codec == "none" else f"{self.method}, {self.codec}"

    def mean(self, what: str) -> float:
        """Of "up" or "down" bytes by client and round."""
        return statistics.mean(part[what] for part in self.parts)

    @property
    def work_seconds(self) -> float:
        """Of one client's round."""
        return statistics.mean(part["seconds"] / (part["rounds"] * self.clients) for part in self.parts)

    def round_seconds(self, link: Link) -> float:
        """Of a round on such links."""
        return self.work_seconds + link.seconds(self.mean("down"), self.mean("up"))


def run(bench: Bench) -> Findings:
    """Count and train every method, count by clients, and work out the links."""
    settings = bench.settings
    data = bench.present(settings["datasets"])[0]
    dataset = bench.dataset(data, **_part(bench))
    by_seed = {seed: _communication(bench, dataset, seed) for seed in bench.seeds}
    counted = by_seed[bench.seeds[0]]
    sent = [
        Sent(
            method,
            codec,
            [_trained(bench, found, method, codec, seed) for seed, found in by_seed.items()],
            settings["clients"],
        )
        for method, codec in counted.trainings()
        if f"{method}/{codec}" in settings["methods"]
    ]
    links = [Link(bits, latency) for bits in settings["bits_per_second"] for latency in settings["latency_ms"]]
    return Findings(
        tables=[
            _sent_table(bench, dataset, sent, counted.tables[counted.skeletons[0].name]),
            _link_table(sent, links),
            _client_table(bench, dataset),
            _larger_table(counted),
        ],
        charts=[_link_chart([one for one in sent if one.key in settings["drawn"]], links), _bytes_chart(sent)],
        notes=_notes(dataset, counted),
    )


def _part(bench: Bench) -> dict[str, Any]:
    """Which part of the data set is used."""
    return {name: bench.settings.get(name) for name in ("classes", "train", "test")}


def _communication(bench: Bench, dataset: Dataset, seed: int) -> Communication:
    config = bench.config(seed, _changes(bench))
    return Communication(dataset, config, store=bench.store, report=bench.telling(dataset.name))


def _changes(bench: Bench) -> dict[str, Any]:
    settings = bench.settings
    return {
        "federation.clients": settings["clients"],
        "federation.rounds": settings["rounds"],
        "training.head.epochs": settings["head_epochs"],
        "training.adapter.epochs": settings["adapter_epochs"],
        "training.passages": settings["passages"],
    }


def _trained(bench: Bench, found: Communication, method: Method, codec: SentCodec, seed: int) -> dict[str, Any]:
    key = f"{found.dataset.name}/{method}/{codec}/seed {seed}"
    return bench.measure(key, lambda: found.train(method, codec).to_dict(), matters={**_changes(bench), **_part(bench)})


def _by_clients(bench: Bench, dataset: Dataset, clients: int) -> dict[str, Any]:
    """Bytes of one round of so many clients, of one query each: what is sent does not depend on the queries."""
    few = replace(dataset, train=dataset.train[:clients], test=dataset.test[:1])
    changes = {
        "federation.clients": clients,
        "federation.rounds": 1,
        "training.head.epochs": 0,
        "training.adapter.epochs": 1,
        "training.passages": 0,
    }

    def work() -> dict[str, Any]:
        found = simulate(bench, few, bench.config(bench.seeds[0], changes), f"{clients} clients")["adapter"]["rounds"][
            0
        ]
        return {"up": found["bytes_up"], "down": found["bytes_down"]}

    key = f"{dataset.name}/bytes of a round, {clients} clients"
    return bench.measure(key, work, matters={**changes, **_part(bench)})


def _sent_table(bench: Bench, dataset: Dataset, sent: Sequence[Sent], shapes: Sequence[Payload]) -> Table:
    rows = []
    for one in sent:
        row = _payload(shapes, one)
        recalls = [100 * part["recall"]["value"] for part in one.parts]
        rows.append(
            (
                *(one.method, row.codec, f"{row.part:,}", _ratio(row.to_lora), f"{row.part + row.head:,}"),
                *(_ratio(row.to_full), f"{one.mean('up'):,.0f}", f"{one.mean('down'):,.0f}"),
                *(f"{one.work_seconds:.2f}", f"{statistics.mean(recalls):.2f}", spread(recalls)),
            )
        )
    settings = bench.settings
    title = f"What a round sends: {counts(dataset)}, {settings['clients']} clients, seeds {seeds_text(bench.seeds)}"
    return Table(title=title, columns=_SENT_COLUMNS, rows=rows, note=_SENT_NOTE)


def _payload(shapes: Sequence[Payload], sent: Sent) -> Payload:
    codec = "float32" if sent.codec == "none" else sent.codec
    return next(row for row in shapes if (row.method, row.codec) == (sent.method, codec))


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 0.1 else f"1/{1 / value:,.0f}"


def _link_table(sent: Sequence[Sent], links: Sequence[Link]) -> Table:
    columns = ("link", *(f"{one.name}, s" for one in sent))
    rows = [(str(link), *(_seconds(one.round_seconds(link)) for one in sent)) for link in links]
    rows.append(("no link: a client's work", *(_seconds(one.work_seconds) for one in sent)))
    return Table(title="Seconds of a round by link", columns=columns, rows=rows, note=_LINK_NOTE)


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _client_table(bench: Bench, dataset: Dataset) -> Table:
    rows = []
    for clients in bench.settings["counted_clients"]:
        found = _by_clients(bench, dataset, clients)
        both = (found["up"] + found["down"]) / clients
        rows.append((str(clients), f"{found['up']:,}", f"{found['down']:,}", f"{both:,.0f}"))
    return Table(title="Bytes by number of clients", columns=_CLIENT_COLUMNS, rows=rows, note=_CLIENT_NOTE)


def _larger_table(counted: Communication) -> Table:
    """The same head on larger models, of which only the sizes are known here."""
    rows = [
        (
            *(skeleton.name, row.method, row.codec, f"{row.part + row.head:,}", _ratio(row.to_full)),
            _ratio((row.part + row.head) / (4 * skeleton.numbers)),
        )
        for skeleton in counted.skeletons
        for row in counted.tables[skeleton.name]
        if row.codec != "float16"
    ]
    note = "From published shapes, nothing is trained. Of the model: by all its numbers in float32."
    return Table(title="Bytes up by model", columns=_LARGER_COLUMNS, rows=rows, note=note)


def _link_chart(sent: Sequence[Sent], links: Sequence[Link]) -> Chart:
    latency = min(link.latency_ms for link in links)
    shown = [link for link in links if link.latency_ms == latency]
    series = [
        Series(name=one.name, x=[str(link) for link in shown], y=[one.round_seconds(link) for link in shown])
        for one in sent
    ]
    return Chart(
        name="links",
        title="Seconds of a round by link, from measured bytes",
        kind="bar",
        x_label="each client's link to the server, latency one way",
        y_label="seconds of a round (logarithmic)",
        series=series,
        log_y=True,
    )


def _bytes_chart(sent: Sequence[Sent]) -> Chart:
    names = [one.name for one in sent]
    values = [one.mean(way) for one in sent for way in ("up", "down")]
    wide = max(values) > 20 * min(values)
    series = [
        Series(name=f"{way} a client and round", x=names, y=[one.mean(way) / 1e6 for one in sent])
        for way in ("up", "down")
    ]
    return Chart(
        name="bytes",
        title="Bytes on the wire, measured",
        kind="bar",
        x_label="trained beside the head, codec",
        y_label="MB (logarithmic)" if wide else "MB",
        series=series,
        log_y=wide,
    )


def _notes(dataset: Dataset, counted: Communication) -> list[str]:
    full = counted.tables[counted.skeletons[0].name][0]
    notes = [
        f"With {len(dataset.catalogue):,} documents the head is {full.head / (full.head + full.part):.0%} of what a "
        "round with a full adapter sends.",
        "The server's own line is not in the table of links: with K clients K times the bytes pass it each round.",
    ]
    if not counted.has_peft:
        notes.append("Without LoRA's recall: peft is not installed (pip install 'caravan[compare]').")
    return notes
