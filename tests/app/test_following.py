"""A training as others see it: while it runs, stopped, killed, resumed, finished; over HTTP with events."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from caravan.app.experiment import checkpoint_folder, run_experiment
from caravan.app.traces import LINES, STAGES, Traces
from caravan.app.web import bodies
from caravan.app.web.following import Following
from caravan.config import PrivacyConfig
from caravan.files import is_held
from caravan.training.progress import Progress
from saved_retrievers import FILES
from served import KEYS, READER, events_of, listening, make, refusal, serving
from toy_experiments import DATASET
from toy_training import Log, StoppedError

pytestmark = pytest.mark.usefixtures("vectors_are_kept_here", "few_queries_are_timed", "ledger_folder")


class Watcher:
    """A report that looks at the training, as the service does, each time it is told of some work."""

    def __init__(self, folder, *, stop_after: int | None = None) -> None:
        self.following, self.seen, self.left = Following(folder), [], stop_after

    def __call__(self, progress: Progress) -> None:
        found = self.following.read()
        if not self.seen or self.seen[-1] is not found:
            self.seen.append(found)
        if self.left is not None:
            self.left -= 1
            if not self.left:
                raise StoppedError


def checked(value) -> bodies.TrainingAnswer:
    return bodies.TrainingAnswer.model_validate_json(json.dumps(value, allow_nan=False), strict=True)


def steps(value) -> list[tuple[str, int, int]]:
    return [(point["stage"], point["step"], point["of"]) for point in value["points"]]


class TestStates:
    def test_without_a_training_there_is_none(self, tmp_path: Path, master: Path) -> None:
        found = checked(Following(tmp_path / "out").read())
        assert (found.state, found.folder, found.points) == ("none", "out", [])
        assert Following(master).read()["state"] == "none"  # saved, but by no training that wrote down its settings

    def test_a_central_training_is_seen_epoch_by_epoch_and_ends_as_its_record_says(self, place, tmp_path) -> None:
        out = tmp_path / "out"
        watcher = Watcher(out)
        run_experiment(place.config(mode="adapter", epochs=2), out, report=watcher)
        running = [each for each in watcher.seen if each["state"] == "running"]
        assert {"none", "running"} <= {each["state"] for each in watcher.seen} <= {"none", "running", "finished"}
        whole = [("head", 1, 2), ("head", 2, 2), ("adapter", 1, 2), ("adapter", 2, 2)]
        assert [steps(each) for each in running] == [whole[:count] for count in range(5)]
        for each in watcher.seen:
            checked(each)

        record = json.loads((out / "training.json").read_text())
        end = checked(Following(out).read())
        assert (end.state, end.folder, end.now) == ("finished", "out", None)
        assert [point.loss for point in end.points] == [epoch["loss"] for epoch in record["history"]]
        assert [point.recall_at_1 for point in end.points] == [e["validation_recall"] for e in record["history"]]
        total = sum(epoch["seconds"] for epoch in record["history"])
        assert end.points[-1].seconds == pytest.approx(total, abs=0.01)
        assert end.measures["results"] == json.loads(json.dumps(record["metrics"]))
        assert end.settings == running[0]["settings"]
        assert end.privacy == running[0]["privacy"] == record["privacy"]
        assert [point["loss"] for point in running[-1]["points"]] == [p.loss for p in end.points]
        assert not checkpoint_folder(out).exists()

    def test_a_federation_is_seen_round_by_round_with_its_bytes_and_without_its_clients(self, place, tmp_path) -> None:
        out = tmp_path / "out"
        federation = {"partition": "column", "column": "site", "rounds": 2}
        watcher = Watcher(out)
        run_experiment(place.config(mode="head", epochs=4, federation=federation), out, report=watcher)
        running = [each for each in watcher.seen if each["state"] == "running"]
        assert [steps(each) for each in running] == [[], [("head", 1, 2)], [("head", 1, 2), ("head", 2, 2)]]
        rounds = json.loads((out / "training.json").read_text())["federation"]["rounds"]
        end = checked(Following(out).read())
        for point, each in zip(end.points, rounds, strict=True):
            assert (point.bytes_up, point.bytes_down) == (each["bytes_up"], each["bytes_down"])
            losses = [metrics["loss"] for metrics in each["metrics"]]
            shares = [count / sum(each["examples"]) for count in each["examples"]]
            assert point.loss == pytest.approx(sum(map(lambda a, b: a * b, losses, shares)))
            assert point.epsilon is None
        assert running[1]["points"][0]["bytes_up"] == rounds[0]["bytes_up"]
        shown = json.dumps([*watcher.seen, Following(out).read()])
        assert not any(site in shown for site in ("north", "east", "west"))

    def test_no_query_is_ever_shown_and_none_is_in_the_file(self, place, tmp_path) -> None:
        watcher = Watcher(tmp_path / "out", stop_after=40)
        with pytest.raises(StoppedError):
            run_experiment(
                place.config(mode="adapter", epochs=3, checkpoint_seconds=1e-9), tmp_path / "out", report=watcher
            )
        told = json.dumps(watcher.seen) + (checkpoint_folder(tmp_path / "out") / LINES).read_text()
        assert '"point"' in told
        assert not any(example.text in told for example in (*DATASET.train, *DATASET.validation, *DATASET.test))

    def test_one_that_failed_is_stopped_and_goes_on_where_it_was_when_resumed(self, place, tmp_path) -> None:
        out, config = tmp_path / "out", place.config(mode="adapter", epochs=3, checkpoint_seconds=1e-9)
        with pytest.raises(StoppedError):
            run_experiment(config, out, report=Watcher(out, stop_after=30))
        stopped = checked(Following(out).read())
        assert (stopped.state, stopped.now) == ("stopped", None)
        assert len(stopped.points) >= 3
        watcher = Watcher(out)
        run_experiment(config, out, resume=True, report=watcher)
        running = [each for each in watcher.seen if each["state"] == "running"]
        assert steps(running[0])[: len(stopped.points)] == [(p.stage, p.step, p.of) for p in stopped.points]
        assert steps(running[-1]) == sorted(set(steps(running[-1])), key=lambda step: (STAGES.index(step[0]), step[1]))
        assert checked(Following(out).read()).state == "finished"

    def test_a_new_training_into_the_folder_of_an_old_one_takes_its_place(self, place, tmp_path) -> None:
        out = tmp_path / "out"
        run_experiment(place.config(mode="head", epochs=1), out)
        watcher = Watcher(out)
        run_experiment(place.config(mode="head", epochs=2), out, report=watcher)
        assert [(each["state"], len(each["points"])) for each in watcher.seen][:3] == [
            ("finished", 1), ("running", 0), ("running", 1)
        ]  # fmt: skip

    def test_a_training_that_fails_before_its_first_snapshot_leaves_nothing(self, place, tmp_path) -> None:
        with pytest.raises(StoppedError):
            run_experiment(place.config(mode="head"), tmp_path / "out", report=Log(stop_after=3))
        assert not checkpoint_folder(tmp_path / "out").exists()

    def test_what_a_private_training_has_spent_is_shown_and_no_loss(self, place, tmp_path) -> None:
        out, watcher = tmp_path / "out", Watcher(tmp_path / "out")
        config = place.config(mode="head", epochs=2, federation={"clients": 2, "rounds": 2})
        privacy = PrivacyConfig(mode="dp-sgd", batch=12, noise_multiplier=1.0)
        run_experiment(replace(config, privacy=privacy), out, report=watcher)
        end = checked(Following(out).read())
        spent = [point.epsilon for point in end.points]
        assert None not in spent
        assert spent == sorted(spent)
        assert [point.loss for point in end.points] == [None, None]
        assert end.privacy.startswith("Trained with differential privacy")
        running = next(each for each in reversed(watcher.seen) if each["state"] == "running")
        assert running["points"][0]["epsilon"] == spent[0]
        assert running["privacy"].startswith("Trained with differential privacy")

    def test_rounds_that_hide_whole_clients_say_what_they_cost(self, place, tmp_path) -> None:
        privacy = PrivacyConfig(mode="client-level", noise_multiplier=1.0)
        config = place.config(mode="adapter", epochs=2, federation={"clients": 3, "rounds": 2})
        retriever = run_experiment(replace(config, privacy=privacy), tmp_path / "out")[1]
        spent = [point["epsilon"] for point in Following(tmp_path / "out").read()["points"]]
        assert len(spent) == 4
        assert spent == sorted(spent)
        whole = retriever.record["guarantees"]["clients"]["epsilon"]
        assert whole <= spent[-1] < 1.02 * whole

    def test_the_folder_of_a_federation_of_machines_is_followed_too(self, tmp_path) -> None:
        (tmp_path / "caravan.toml").write_text("")
        traces = Traces(tmp_path / "checkpoint", lambda: "")
        following = Following(tmp_path)
        with traces.running(lambda: {"settings": {"seed": 1}, "privacy": "none"}):
            assert (following.read()["state"], following.read()["folder"]) == ("running", "model")
        assert following.read()["state"] == "finished"


class TestLines:
    def test_the_file_is_held_while_the_training_runs(self, tmp_path) -> None:
        traces = Traces(tmp_path / "kept", lambda: "")
        lines = tmp_path / "kept" / LINES
        assert not is_held(lines)
        with traces.running(lambda: {"settings": {}, "privacy": ""}):
            assert is_held(lines)
        assert not is_held(lines)
        traces.clear()
        assert not list(lines.parent.iterdir())
        traces.clear(folder=True)
        assert not lines.parent.exists()

    def test_how_far_the_work_is_is_told_now_and_then_and_clients_are_not_named(self, tmp_path, monkeypatch) -> None:
        now = [0.0]
        monkeypatch.setattr("caravan.app.traces.time.monotonic", lambda: now[0])
        traces, told = Traces(tmp_path / "out.checkpoint", lambda: ""), []
        report = traces.watching(told.append)
        with traces.running(lambda: {"settings": {}, "privacy": ""}):
            for second in range(4000):
                now[0] = float(second)
                report(Progress("round 1/2, a: b: training the head", second, 4000, loss=0.5))
            found = Following(tmp_path / "out").read()
        assert found["now"]["task"] == "round 1/2: training the head"
        assert found["now"]["done"] > 3970
        assert len(told) == 4000
        count = (tmp_path / "out.checkpoint" / LINES).read_text().count('"now"')
        assert 200 < count < 700

    def test_what_a_kill_left_of_a_line_is_passed_over(self, tmp_path) -> None:
        traces, lines = Traces(tmp_path / "out.checkpoint", lambda: ""), tmp_path / "out.checkpoint" / LINES
        point = {"stage": "head", "of": 9, "loss": 0.5, "recall_at_1": None, "seconds": 1.0}
        point |= {"bytes_up": None, "bytes_down": None, "epsilon": float("inf")}
        with traces.running(lambda: {"settings": {}, "privacy": ""}):
            traces.add({**point, "step": 1})
        with lines.open("a") as stream:
            stream.write('{"kind": "point", "sta')
        with traces.running(lambda: {"settings": {}, "privacy": ""}):
            traces.add({**point, "step": 2})
            traces.add({**point, "step": 2, "loss": 0.25})
            found = checked(Following(tmp_path / "out").read())
        assert [(p.step, p.loss, p.seconds, p.epsilon) for p in found.points] == [
            (1, 0.5, 1.0, None),
            (2, 0.25, 2.0, None),
        ]

    def test_a_disk_that_takes_no_line_does_not_stop_a_training(self, tmp_path, monkeypatch) -> None:
        def full(handle, content):
            raise OSError(28, "No space left on device")

        traces = Traces(tmp_path / "kept", lambda: "")
        with monkeypatch.context() as patch:
            patch.setattr("caravan.app.traces.os.write", full)
            with traces.running(lambda: {"settings": {}, "privacy": ""}):
                traces.add({"stage": "head"})
        (tmp_path / "file").write_text("")
        with Traces(tmp_path / "file", lambda: "").running(lambda: {"settings": {}, "privacy": ""}):
            pass

    def test_a_folder_that_holds_nonsense_is_none(self, tmp_path) -> None:
        lines = checkpoint_folder(tmp_path / "out") / LINES
        lines.parent.mkdir()
        lines.write_bytes(b'\xff\xfe\n[]\n{"kind": 7}\n{"kind": "point"}\n{"kind": "begin"}\n{"kind":"now"}\n1\n"a"\n')
        assert checked(Following(tmp_path / "out").read()).points == []
        (tmp_path / "other").mkdir()
        for name in FILES:
            (tmp_path / "other" / name).write_text("[]")
        assert Following(tmp_path / "other").read()["state"] == "none"


class TestRoutes:
    def test_what_is_shown_is_what_the_description_says(self, workshop) -> None:
        with serving(workshop.model) as client:
            answer = bodies.TrainingAnswer.model_validate_json(client.get("/training").text, strict=True)
            assert client.get("/info").json()["training"] is True
        assert (answer.state, answer.folder) == ("finished", "model")
        assert [(point.stage, point.step, point.of) for point in answer.points] == [("head", 1, 2), ("head", 2, 2)]
        assert answer.privacy.startswith("Trained without differential privacy")
        assert answer.measures["split"] == "test"
        assert str(workshop.model.parent) not in answer.model_dump_json()

    def test_another_folder_than_the_served_one_can_be_followed(self, master: Path, workshop) -> None:
        with serving(master) as client:
            assert client.get("/training").json()["state"] == "none"
            assert client.get("/info").json()["training"] is False
        with serving(master, training=str(workshop.model)) as client:
            assert client.get("/training").json()["state"] == "finished"

    def test_a_key_is_needed_where_there_are_keys(self, master: Path) -> None:
        with serving(master, keys=KEYS) as client:
            refusal(client.get("/training"), 401)
            refusal(client.get("/training/events"), 401)
            assert client.get("/training", headers=READER).status_code == 200

    def test_several_follow_a_training_and_all_streams_end_with_the_service(self, master: Path, tmp_path: Path) -> None:
        traces, out = Traces(tmp_path / "out.checkpoint", lambda: ""), tmp_path / "out"
        point = {"stage": "head", "of": 2, "loss": 0.5, "recall_at_1": None, "seconds": 1.0}
        point |= {"bytes_up": None, "bytes_down": None, "epsilon": None}
        seen: list[list[dict]] = [[], [], []]
        met = threading.Barrier(4)

        def follow(address: str, own: list[dict]) -> None:
            with httpx2.stream("GET", f"{address}/training/events", timeout=20) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                for name, data in events_of(response.iter_lines()):
                    assert name == "training"
                    own.append(data)
                    if (data["state"], len(data["points"])) in (("none", 0), ("running", 1), ("finished", 2)):
                        met.wait(20)

        with listening(make(master, training=str(out))) as address:
            threads = [threading.Thread(target=follow, args=(address, own)) for own in seen]
            for thread in threads:
                thread.start()
            met.wait(20)
            with traces.running(lambda: {"settings": {"seed": 1}, "privacy": "none"}):
                traces.add({**point, "step": 1})
                met.wait(20)
                traces.add({**point, "step": 2})
            met.wait(20)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        for own in seen:
            assert [own[0]["state"], own[-1]["state"]] == ["none", "finished"]
            assert [len(value["points"]) for value in own] == sorted(len(value["points"]) for value in own)
            for value in own:
                checked(value)

    def test_a_silent_stream_beats_and_those_that_end_make_room(self, master: Path, monkeypatch) -> None:
        monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.05)
        monkeypatch.setattr("caravan.app.web.following._MOST_FOLLOWERS", 1)
        app = make(master)
        with listening(app) as address, httpx2.Client(base_url=address, timeout=20) as client:
            with client.stream("GET", "/training/events") as response:
                lines = response.iter_lines()
                assert any(line.startswith(":") for line in lines)
                assert "1 follow already" in refusal(client.get("/training/events"), 429)
            for _ in range(2000):
                if not app.state.following.followers:
                    break
                client.get("/health")
            with client.stream("GET", "/training/events") as response:
                assert response.status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process")
def test_a_training_that_is_killed_is_seen_to_have_stopped(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom caravan.app.traces import Traces\n"
        "with Traces(sys.argv[1], lambda: '').running(lambda: {'settings': {}, 'privacy': ''}):\n"
        "    print('runs', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out.checkpoint")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        following = Following(tmp_path / "out")
        assert following.read()["state"] == "running"
        os.kill(process.pid, signal.SIGKILL)
    assert following.read()["state"] == "stopped"
