"""`caravan serve` as a command: what it refuses, and real processes that are killed and told to stop."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

import caravan.app.web
from caravan.config import BackboneConfig
from caravan.model.backbone import load_backbone
from caravan.storage import load, save
from command_line import Workshop, check_refused, run, start_program
from saved_retrievers import make_retriever
from tiny_models import make_tiny_bert


def test_the_description_can_be_printed(workshop: Workshop) -> None:
    outcome = run("serve", workshop.model, "--json")
    assert outcome.code == 0, outcome.err
    assert "/search" in json.loads(outcome.out)["paths"]


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_is_named_in_one_line(workshop: Workshop, monkeypatch, missing: str) -> None:
    for name in [name for name in sys.modules if name.startswith("caravan.app.") or name.startswith("uvicorn")]:
        if name.rpartition(".")[2] in ("hosting", "service", "metrics", "gate", "shelf") or name.startswith("uvicorn"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(caravan.app.web, "hosting", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    check_refused(run("serve", workshop.model), missing, "pip install 'caravan[serve]'")


def test_what_cannot_be_served_is_refused_in_one_line(workshop: Workshop, tmp_path: Path) -> None:
    check_refused(run("serve", tmp_path / "none"), "no such folder")
    check_refused(run("serve", workshop.model, "--keys", tmp_path / "none"), "No such file")
    check_refused(run("serve", workshop.model, "--max-batch", 0), "--max-batch", "got 0")
    check_refused(run("serve", workshop.model, "--max-waiting", 10), "--max-waiting 10 is below --max-texts 256")
    check_refused(run("serve", workshop.model, "--workers", 2, "--watch", 0), "--watch 0 with several workers")
    check_refused(run("serve", workshop.model, "--generator", "self"), "own model cannot write")
    check_refused(run("serve", workshop.model, "--generator", "self", "--workers", 2), "own model cannot write")
    check_refused(run("serve", workshop.model, "--endpoint", "http://h/v1"), "--endpoint-model", code=2)
    check_refused(run("serve", workshop.model, "--max-asking", 0), "--max-asking", "got 0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_refused(run("serve", workshop.model, "--port", port), str(port), "choose another --port")


def test_the_help_loads_neither_fastapi_nor_torch() -> None:
    code = "import sys; sys.argv = ['caravan', 'serve', '--help']\nfrom caravan.app.cli import app\n"
    code += "try: app()\nexcept SystemExit: print(*sorted({'fastapi', 'uvicorn', 'torch'} & set(sys.modules)), 'end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["end"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_frozen_weights_lie_in_the_file_which_several_workers_share(tmp_path: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path / "bert", vocab_size=5000))))
    address = backbone.table.weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            assert line.endswith("bert/model.safetensors")
            return
    raise AssertionError("in no mapping")


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str, list[str]]]:
    """The real program: its process, its address and the lines of its log so far."""
    lines: list[str] = []
    with start_program("serve", str(folder), "--port", "0", *options, stdout=subprocess.DEVNULL) as process:
        errors = process.stderr
        assert errors is not None
        first = errors.readline().decode()
        reader = threading.Thread(target=lambda: lines.extend(line.decode() for line in errors))
        reader.start()
        try:
            found = re.fullmatch(r"Serving .* at (http://127\.0\.0\.1:\d+)\n", first)
            assert found, first
            _until(lambda: httpx2.get(f"{found[1]}/health", timeout=60).status_code == 200)
            yield process, found[1], lines
        finally:
            process.terminate()
            process.wait(60)
            reader.join()


def _until(condition, *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("it never came")


@pytest.fixture
def folder(tmp_path: Path, workshop: Workshop) -> Path:
    backbone = load_backbone(BackboneConfig(name=str(workshop.backbone), max_tokens=24))
    return save(make_retriever(backbone), tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_answers_what_came_in_and_ends(folder: Path, sent: int) -> None:
    with served(folder) as (process, address, lines):
        answers: list[int] = []

        def ask() -> None:
            with httpx2.Client(timeout=60) as client:
                for _ in range(1000):
                    try:
                        answers.append(client.post(f"{address}/search", json={"query": "refund"}).status_code)
                    except httpx2.TransportError:  # refused, or sent on a connection that was just being closed
                        answers.append(0)
                        return

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        _until(lambda: len(answers) > 20)
        process.send_signal(sent)
        for thread in threads:
            thread.join(60)
        assert process.wait(60) in (130, -signal.SIGTERM)
        assert set(answers) <= {200, 0, 503}
    assert not [line for line in lines if "Traceback" in line]
    # What the service took, it answered, and the answers arrived.
    taken = [json.loads(line)["status"] for line in lines if '"/search"' in line]
    assert sorted(taken) == sorted(status for status in answers if status)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_told_to_stop_it_ends_what_has_no_end(folder: Path, workshop: Workshop, workers: str) -> None:
    with served(folder, "--workers", workers, "--training", str(workshop.model)) as (process, address, lines):
        ended: list[float] = []

        def follow() -> None:
            with httpx2.stream("GET", f"{address}/training/events", timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        met.wait(60)
            ended.append(time.monotonic())

        met = threading.Barrier(5)
        threads = [threading.Thread(target=follow) for _ in range(4)]
        for thread in threads:
            thread.start()
        met.wait(60)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        process.wait(60)
        assert len(ended) == 4
        assert max(ended) - began < 20  # well before the 30 seconds after which connections are cut
        assert not [line for line in lines if "Traceback" in line]


@pytest.mark.slow
def test_a_worker_that_is_killed_under_load_costs_the_requests_it_had_and_no_other(folder: Path) -> None:
    with served(folder, "--workers", "2", "--watch", "0.1") as (process, address, lines):
        answers: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                try:  # each on a connection, and so perhaps a worker, of its own
                    answers.append(httpx2.post(f"{address}/search", json={"query": "refund"}, timeout=60).status_code)
                except httpx2.TransportError:
                    answers.append(0)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            before = len(answers)
            _until(lambda before=before: len(answers) > before + 50)
            (victim, *_others) = workers = _workers(process.pid)
            assert len(workers) == 2
            os.kill(victim, signal.SIGKILL)
            _until(lambda victim=victim: len(_workers(process.pid)) == 2 and victim not in _workers(process.pid))
        count = len(answers)
        _until(lambda: len(answers) > count + 50)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert set(answers) <= {200, 0}
        assert answers.count(0) <= 4 * 2 + 4  # those in the victims' hands, not those that came later
        assert 0 not in answers[-40:]
        assert not [line for line in lines if "Traceback" in line]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_all_workers_see_a_change(folder: Path) -> None:
    with served(folder, "--workers", "2", "--local-changes", "--watch", "0.1") as (process, address, _):
        workers = _workers(process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        _until(lambda: len(_workers(process.pid)) == 2 and workers[0] not in _workers(process.pid))
        body = {"documents": [{"doc_id": "bell", "text": "turn the ring"}]}
        _until(lambda: httpx2.post(f"{address}/documents", json=body, timeout=60).status_code == 200)

        def known() -> bool:  # each request on a connection, and so perhaps a worker, of its own
            return {httpx2.get(f"{address}/info", timeout=60).json()["documents"] for _ in range(10)} == {4}

        _until(known)
        text = httpx2.get(f"{address}/metrics", timeout=60).text
        assert 'route="/documents",status="200"' in text
    assert "bell" in load(folder).catalogue.ids


def _workers(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline")
        if command.exists() and b"spawn_main" in command.read_bytes():
            found.append(int(child))
    return found


@pytest.mark.slow
def test_kills_in_the_middle_of_changes_lose_nothing_that_was_answered(folder: Path) -> None:
    kept: list[str] = []
    for attempt in range(3):
        with served(folder, "--local-changes") as (process, address, _):
            killer = threading.Timer(0.15 + 0.1 * attempt, process.kill)
            killer.start()
            number = 0
            while True:
                name = f"{attempt}-{number}"
                try:
                    body = {"documents": [{"doc_id": name, "text": f"text {name}"}]}
                    answer = httpx2.post(f"{address}/documents", json=body, timeout=60)
                except httpx2.TransportError:
                    break
                assert answer.status_code == 200
                kept.append(name)
                number += 1
            killer.join()
        assert set(kept) <= set(load(folder).catalogue.ids)
    assert kept


@pytest.mark.slow
def test_a_full_disk_refuses_a_document_and_serves_on(tmp_path: Path, folder: Path) -> None:
    from disks import small_disk

    with small_disk(tmp_path / "disk", kib=400) as disk:
        shutil.copytree(folder, disk / "model")
        with (
            served(disk / "model", "--local-changes") as (_, address, _lines),
            httpx2.Client(base_url=address, timeout=60) as client,
        ):
            statuses = []
            for number in range(40):
                document = {"doc_id": str(number), "text": f"{number} " + "word " * 3000}
                statuses.append(client.post("/documents", json={"documents": [document]}).status_code)
                if statuses[-1] != 200:
                    break
            assert statuses[-1] == 503
            assert client.post("/search", json={"query": "refund"}).status_code == 200
            assert client.get("/info").json()["documents"] == 2 + len(statuses)
        assert len(load(disk / "model").catalogue) == 2 + len(statuses)
