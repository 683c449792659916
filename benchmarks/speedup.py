"""How much sooner is a federation done than one machine with all the queries?

Usage: python benchmarks/speedup.py OUT.json [--queries N] [--repeats N] [--clients K ...] [--no-deployment]

Central training has one process on one core. Two clients have a process and a core each and train at the same time:
that is measured by the clock. For more clients than cores one process plays them in turn, and what is reported is the
critical path of every round: the slowest client, and all that server and wire add. Each side starts without cached
vectors, has its model loaded, and passes over every query equally often. Repeats alternate between central and
federated training, and the median of the ratios is reported, so that a machine whose speed varies does less harm.

Two "cores" need not be twice one: they may share what multiplies matrices. So each repeat also runs two copies of
central training side by side, and "ceiling" is twice the time of one alone over theirs: what two processes with half of
the work each could reach at best. Blocks compute in float32 on both sides.

What a round costs beside training where every message starts a process, as on real nodes, is measured by a deployment
on this machine with nearly nothing to train (`caravan federate`, TLS and node keys).
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from torch import Tensor

from caravan.app.learning import Experiment
from caravan.config import Config, DataConfig
from caravan.data.dataset import Dataset
from caravan.federation.local import Part, train_client, trained_names
from caravan.federation.messages import decode, encode
from caravan.federation.rounds import Update, average
from caravan.files import whole_file
from caravan.training.features import FeatureStore
from caravan.training.trainer import Stage, fit

DATA = Path(os.environ.get("CARAVAN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STAGES: tuple[Stage, ...] = ("head", "adapter")
PAPER = {2: 1.75, 3: 2.62}  # arXiv:2509.16508
WORK_SECONDS = (10, 60, 600)
NODES = ("one", "two")


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="*", default=[3, 4, 8, 16], help="whose critical path is measured")
    parser.add_argument("--no-deployment", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "queries": arguments.queries,
        "pairs": {stage: [] for stage in STAGES},
        "critical_path": {stage: {} for stage in STAGES},
    }
    for _ in range(arguments.repeats):
        central, together = timed_central(arguments.queries), timed_together(arguments.queries, 2)
        copies = timed_copies(arguments.queries, 2)
        for stage in STAGES:
            pair = {"central": central[stage], "two clients": together[stage], "two copies": copies[stage]}
            results["pairs"][stage].append(pair)
        save(results, arguments.out)
    for clients in arguments.clients:
        in_turn = timed_in_turn(arguments.queries, clients)
        for stage in STAGES:
            results["critical_path"][stage][str(clients)] = in_turn[stage]
        save(results, arguments.out)
    if not arguments.no_deployment:
        results["deployment_round_seconds"] = deployment_round_seconds()
        save(results, arguments.out)
    print(table(results))


def save(results: dict[str, Any], out: Path) -> None:
    """Write what is known so far."""
    with whole_file(out) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def prepare(queries: int, clients: int, store: FeatureStore) -> Experiment:
    """A training on so many of banking77's training queries, its model and the documents' vectors loaded."""
    path = str(DATA / "banking77") if (DATA / "banking77").is_dir() else "helpdesk"
    config = Config(data=DataConfig(path=path, validation_fraction=0.0))
    config = replace(
        config,
        federation=replace(config.federation, clients=clients),
        training=replace(config.training, precision="float32"),
    )
    dataset = Dataset.from_config(config.data, seed=config.seed)
    train = list(dataset.train)[:: max(1, len(dataset.train) // queries)][:queries]
    return Experiment(replace(dataset, train=train, validation=(), test=()), config, store=store)


def timed_central(queries: int) -> dict[Stage, float]:
    """Seconds of each stage, in a process of its own."""
    return timed_copies(queries, 1)


def timed_copies(queries: int, copies: int) -> dict[Stage, float]:
    """Seconds of each stage of central training, the slowest of so many that run side by side."""
    pipes = [multiprocessing.Pipe() for _ in range(copies)]
    processes = [_start(_central, theirs, queries) for _, theirs in pipes]
    seconds = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    return {stage: max(each[stage] for each in seconds) for stage in STAGES}


def _central(pipe: Connection, queries: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        experiment = prepare(queries, 0, FeatureStore(cache))
        seconds: dict[Stage, float] = {}
        for stage in STAGES:
            started = time.perf_counter()
            fit(
                experiment.retriever,
                experiment.dataset.train,
                stage,
                experiment.config.training,
                seed=experiment.config.seed,
                passages=experiment.passages,
                store=experiment.store,
            )
            seconds[stage] = time.perf_counter() - started
    pipe.send(seconds)


def timed_together(queries: int, clients: int) -> dict[Stage, float]:
    """Seconds of each stage with clients that train at the same time, a process each."""
    workers = [Worker(queries, clients) for _ in range(clients)]
    seconds = {}
    for stage in STAGES:
        started = time.perf_counter()
        for number, rounds in _rounds(stage):
            for place, worker in enumerate(workers):
                worker.ask(stage, number, rounds, place)
            answers = [worker.answer() for worker in workers]
            _share(workers, answers)
        seconds[stage] = time.perf_counter() - started
    for worker in workers:
        worker.end()
    return seconds


def timed_in_turn(queries: int, clients: int) -> dict[Stage, dict[str, float]]:
    """Seconds of each stage's critical path, its clients played one after another by one process."""
    worker = Worker(queries, clients)
    seconds: dict[Stage, dict[str, float]] = {}
    for stage in STAGES:
        path, overhead, work = 0.0, 0.0, 0.0
        for number, rounds in _rounds(stage):
            answers, walls = [], []
            for place in range(clients):
                started = time.perf_counter()
                worker.ask(stage, number, rounds, place)
                answers.append(worker.answer())
                walls.append(time.perf_counter() - started)
            started = time.perf_counter()
            _share([worker], answers)
            joined = time.perf_counter() - started
            local = [seconds for seconds, _ in answers]
            # The server sends to and hears from all clients; their training is what overlaps.
            extra = joined + sum(wall - own for wall, own in zip(walls, local, strict=True))
            path, overhead, work = path + max(local) + extra, overhead + extra, work + sum(local)
        seconds[stage] = {"critical path": path, "server and wire": overhead, "all clients": work}
    worker.end()
    return seconds


class Worker:
    """A process with the frozen model, that plays clients."""

    def __init__(self, queries: int, clients: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = _start(_play, theirs, queries, clients)
        self.tensors: dict[str, Tensor] = _unpacked(self._pipe.recv_bytes())

    def ask(self, stage: Stage, number: int, rounds: int, place: int) -> None:
        """Have a client train for a round."""
        names = [name for name in self.tensors if stage == "adapter" or name.startswith("head.")]
        self._pipe.send((stage, number, rounds, place))
        self._pipe.send_bytes(_packed({name: self.tensors[name] for name in names}))

    def answer(self) -> tuple[float, Update]:
        """The seconds the training took, and its update."""
        seconds, client, examples = self._pipe.recv()
        return seconds, Update(client, _unpacked(self._pipe.recv_bytes()), examples)

    def end(self) -> None:
        """Stop the process."""
        self._pipe.send(None)
        self._process.join()


def _play(pipe: Connection, queries: int, clients: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        experiment = prepare(queries, clients, FeatureStore(cache))
        pipe.send_bytes(_packed(experiment.retriever.trainable_state()))
        while (asked := pipe.recv()) is not None:
            stage, number, rounds, place = asked
            received = _unpacked(pipe.recv_bytes())
            shard = experiment.shards[place]
            started = time.perf_counter()
            update = train_client(
                experiment.retriever,
                shard.name,
                shard.examples,
                experiment.config,
                received,
                part=Part(stage, number, rounds, place, clients),
                passages=experiment.passages,
                proximal_mu=0.0,
                store=experiment.store,
            )
            seconds = time.perf_counter() - started
            assert list(update.tensors) == trained_names(experiment.retriever, stage)
            pipe.send((seconds, update.client, update.examples))
            pipe.send_bytes(_packed(update.tensors))


def _share(workers: Iterable[Worker], answers: list[tuple[float, Update]]) -> None:
    averaged = average([update for _, update in answers])
    for worker in workers:
        worker.tensors |= averaged


def _rounds(stage: Stage) -> list[tuple[int, int]]:
    config = Config()
    rounds = min(config.federation.rounds, getattr(config.training, stage).epochs)
    return [(number, rounds) for number in range(1, rounds + 1)]


def _packed(tensors: dict[str, Tensor]) -> bytes:
    return recorddict_to_proto(RecordDict({"arrays": encode(tensors)})).SerializeToString()


def _unpacked(message: bytes) -> dict[str, Tensor]:
    return decode(recorddict_from_proto(ProtoRecordDict.FromString(message)).array_records["arrays"])


def _start(work: Any, *arguments: Any) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def deployment_round_seconds() -> list[float]:
    """Seconds of the rounds of a federation of two real nodes that have next to nothing to train."""
    with tempfile.TemporaryDirectory() as place:
        folder, logs = Path(place) / "federation", Path(place)
        documents = "doc_id,text\n" + "".join(f"d{number},document {number}\n" for number in range(3))
        (logs / "documents.csv").write_text(documents)
        settings = ["training.mode=head", "federation.rounds=5", "training.head.epochs=5", f"deployment.port={_port()}"]
        options = [word for setting in settings for word in ("--set", setting)]
        names = [word for node in NODES for word in ("--node", node)]
        _run("init", folder, "--documents", logs / "documents.csv", *names, *options).wait()
        processes = [_run("server", folder, log=logs / "server.log")]
        try:
            while "ready: nodes connect to" not in (logs / "server.log").read_text():
                if processes[0].poll() is not None:
                    raise SystemExit((logs / "server.log").read_text())
                time.sleep(0.2)
            for node in NODES:
                data = logs / f"{node}.csv"
                data.write_text("text,label\n" + "".join(f"the document {number},d{number}\n" for number in range(3)))
                processes.append(_run("client", folder, "--name", node, "--data", data, log=logs / f"{node}.log"))
            if _run("submit", folder, "--out", logs / "out", log=logs / "submit.log").wait():
                raise SystemExit((logs / "submit.log").read_text())
            record = json.loads((logs / "out" / "training.json").read_text())
        finally:
            for process in reversed(processes):
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(60)
    return [report["seconds"] for report in record["federation"]["rounds"]]


def _run(*words: Any, log: Path | None = None) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
    caravan = Path(sys.executable).parent / "caravan"
    output = log.open("wb") if log else None
    return subprocess.Popen(
        [caravan, "federate", *map(str, words)], stdout=output, stderr=subprocess.STDOUT, env=environment
    )


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| clients | stage | measured | seconds | central | speed-up | ceiling | server and wire | paper |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for stage in STAGES:
        pairs = results["pairs"][stage]
        central = statistics.median(pair["central"] for pair in pairs)
        two = statistics.median(pair["two clients"] for pair in pairs)
        ratio = statistics.median(pair["central"] / pair["two clients"] for pair in pairs)
        ceiling = statistics.median(2 * pair["central"] / pair["two copies"] for pair in pairs)
        lines.append(
            f"| 2 | {stage} | by the clock | {two:.1f} | {central:.1f} | {ratio:.2f} | {ceiling:.2f} | | {PAPER[2]} |"
        )
        for clients, parts in results["critical_path"][stage].items():
            path, extra = parts["critical path"], parts["server and wire"]
            lines.append(
                f"| {clients} | {stage} | critical path | {path:.1f} | {central:.1f} | {central / path:.2f} "
                f"| | {extra:.2f} | {PAPER.get(int(clients), '')} |"
            )
    if rounds := results.get("deployment_round_seconds"):
        seconds = statistics.median(rounds[1:])  # the first one fills caches
        shares = ", ".join(f"{seconds / (seconds + work):.0%} of a round at {work} s" for work in WORK_SECONDS)
        lines.append(f"\nA round of real nodes takes {seconds:.1f} s beside the training: {shares} of local work.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
