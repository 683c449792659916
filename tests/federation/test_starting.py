"""A process of Flower's on a busy machine: it keeps its task, however long its own imports last."""

import http.server
import os
import subprocess
import sys
import threading
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest

from caravan.federation import starting
from loopback_network import write_queries
from real_federation import make_folder, real_federation
from toy_experiments import DATASET, make_place

# Loaded by each Python process that finds it: where the process is the server's app, Flower takes longer to load than
# its claim on a task lasts, and the process leaves a line in the file `starts`.
SLOW = """
import importlib.util, pathlib, sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "flwr":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (time.sleep(45), load(module))
            return spec

if any("flwr-serverapp" in word for word in sys.orig_argv):
    sys.meta_path.insert(0, Slow())
    with pathlib.Path(__file__).with_name("starts").open("a") as file:
        file.write("started\\n")
"""


@pytest.fixture
def runtime():
    """A Runtime API that knows heartbeats only: `heard` holds path and token of each, `first` is set by the first."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            api.heard.append((self.path, self.headers["flwr-task-token"], self.headers["content-type"]))
            self.send_response(200)
            self.end_headers()
            api.first.set()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        api = SimpleNamespace(heard=[], first=threading.Event(), address=f"127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield api
        server.shutdown()
        thread.join()


def flower_that_loads(monkeypatch, load):
    """Have the installed Flower's programs loaded by `load`."""

    class Points(list):
        def select(self, **_):
            return [SimpleNamespace(load=load)]

    monkeypatch.setattr(starting, "distribution", lambda _: SimpleNamespace(entry_points=Points()))
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def test_a_process_speaks_up_before_flower_is_loaded_and_then_becomes_flowers(runtime, monkeypatch):
    def load():
        assert runtime.first.wait(60)
        return lambda: sys.argv[:2]

    flower_that_loads(monkeypatch, load)
    arguments = ["--runtime-api-address", runtime.address, "--token", "secret", "--insecure", "--parent-pid", "1"]
    with pytest.raises(SystemExit) as ended:
        starting.start("flwr-serverapp", arguments)
    assert ended.value.code == ["flwr-serverapp", "--runtime-api-address"]
    assert sys.argv == ["flwr-serverapp", *arguments]
    assert set(runtime.heard) == {("/v1/runtime/send-task-heartbeat", "secret", "application/protobuf")}


@pytest.mark.parametrize("arguments", [[], ["--runtime-api-address", "127.0.0.1:1", "--token", "secret"], ["--token"]])
def test_a_server_that_does_not_answer_is_left_to_flower(arguments, monkeypatch):
    flower_that_loads(monkeypatch, lambda: lambda: 7)
    with pytest.raises(SystemExit) as ended:
        starting.start("flwr-clientapp", arguments)
    assert ended.value.code == 7


@pytest.mark.parametrize("program", starting.PROGRAMS)
def test_the_installed_flower_has_these_programs(program):
    assert len(distribution("flwr").entry_points.select(group="console_scripts", name=program)) == 1


def test_nothing_but_the_standard_library_is_loaded_before_the_first_word():
    loaded = (
        "import sys; before = set(sys.modules); import caravan.federation.starting; print(*set(sys.modules) - before)"
    )
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    outside = {name.partition(".")[0] for name in found} - sys.stdlib_module_names
    assert outside == {"caravan"}
    assert {name for name in found if name.startswith("caravan")} == {
        "caravan",
        "caravan.federation",
        "caravan.federation.starting",
    }


@pytest.mark.slow
def test_a_real_run_whose_process_takes_longer_to_load_than_its_claim_lasts_begins_once(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    place = make_place(tmp_path)
    folder = make_folder(tmp_path / "fed", place, place.config(mode="head", federation={"rounds": 1}), ["east"])
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW, encoding="utf-8")
    found_first = os.pathsep.join((str(tmp_path / "slow"), os.environ.get("PYTHONPATH", "")))
    with real_federation(folder) as federation:
        federation.serve(PYTHONPATH=found_first)
        federation.join("east", write_queries(tmp_path / "east.csv", DATASET, "east"))
        assert federation.submit(tmp_path / "out") == 0, federation.said("submit")
    assert (tmp_path / "slow/starts").read_text(encoding="utf-8") == "started\n"
