import os
import shlex
import tomllib
from pathlib import Path

import pytest

from caravan.app.nodes import operation
from caravan.errors import FederationError
from command_line import check_refused, listing, run, write_table


@pytest.fixture
def fed(tmp_path: Path) -> Path:
    write_table(tmp_path / "documents.csv", ("doc_id", "text"), [("d0", "first"), ("d1", "second")])
    outcome = run("federate", "init", "fed", "--documents", "documents.csv", "--node", "oslo", "--node", "lima")
    assert outcome.code == 0, outcome.err
    assert "tar -C fed -cf lima.tar caravan.toml documents.jsonl certificates/ca.crt nodes/lima.key" in outcome.out
    return tmp_path / "fed"


def commands(*arguments: object) -> list[tuple[dict[str, str], list[str]]]:
    """What `--print-commands` prints: environment and words of each command."""
    outcome = run("federate", *arguments, "--print-commands")
    assert (outcome.code, outcome.err) == (0, "")
    found = []
    for line in outcome.out.splitlines():
        words = shlex.split(line)
        settings = [word.split("=", 1) for word in words if word.split("=")[0].isupper() and "=" in word]
        found.append((dict(settings), words[len(settings) :]))
    return found


def test_the_server_is_flowers_with_tls_node_keys_and_without_telemetry(fed):
    (environment, server), *keys = commands("server", fed)
    assert server[:5] == ["flower-superlink", "--host", "127.0.0.1", "--port", "9092"]
    assert "--insecure" not in server
    assert server[server.index("--ssl-keyfile") + 1] == str(fed / "certificates/server.key")
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(server)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_HOME"].startswith(str(fed))
    assert environment["CARAVAN_FEDERATION"] == str(fed)
    assert [words[:3] + words[4:] for _, words in keys] == [
        ["flwr", "supernode", "register", "caravan", "--name", node] for node in ("lima", "oslo")
    ]


@pytest.mark.parametrize("command", [("server",), ("client", "--name", "oslo", "--data", "mine.csv")])
def test_flowers_further_programs_are_found_among_our_own_first(fed, command):
    name, *options = command
    (environment, _), *_ = commands(name, fed, *options)
    first, _, rest = environment["PATH"].partition(os.pathsep)
    assert rest == "$PATH"  # the shell's own
    for program in ("flwr-serverapp", "flwr-clientapp"):
        assert os.access(Path(first) / program, os.X_OK)
        assert f"caravan.federation.starting {program} " in (Path(first) / program).read_text(encoding="utf-8")


def test_flowers_own_commands_find_the_server_in_the_folder(fed):
    ((environment, _), *_) = commands("submit", fed, "--out", "model", "--resume")
    home = Path(environment["FLWR_HOME"])
    connection = tomllib.loads((home / "config.toml").read_text(encoding="utf-8"))["superlink"]["caravan"]
    assert connection == {"address": "127.0.0.1:9092", "root-certificates": str(fed / "certificates/ca.crt")}
    run_config = tomllib.loads((home / "run.toml").read_text(encoding="utf-8"))
    assert run_config == {"out": str(fed.parent / "model"), "resume": True}


def test_a_node_keeps_its_files_name_and_what_it_lets_out_to_itself(fed):
    options = ("--weight", 1, "--max-examples", 50, "--metric", "loss")
    ((environment, words),) = commands("client", fed, "--name", "oslo", "--data", "it's mine.csv", *options)
    assert words[:3] == ["flower-supernode", "--superlink", "127.0.0.1:9092"]
    assert words[words.index("--auth-supernode-private-key") + 1] == str(fed / "nodes/oslo.key")
    own = tomllib.loads(Path(words[-1]).read_text(encoding="utf-8"))
    assert own["data"] == str(fed.parent / "it's mine.csv")
    assert (own["name"], own["weight"], own["max-examples"], own["metrics"]) == ("oslo", 1, 50, "loss")
    assert Path(environment["FLWR_HOME"]) == fed / "flower/oslo"


def test_the_address_that_nodes_reach_and_the_one_that_the_server_listens_on_can_differ(tmp_path, fed):
    address = ("--host", "fed.example.org", "--port", "443", "--set", "deployment.bind_port=9092")
    assert run("federate", "init", "far", "--documents", "documents.csv", "--nodes", 2, *address).code == 0
    assert commands("server", "far")[0][1][2:5] == ["127.0.0.1", "--port", "9092"]
    ((_, words),) = commands("client", "far", "--name", "client-1", "--data", "q.csv")
    assert words[2] == "fed.example.org:443"


def test_without_encryption_flower_is_told_so(fed):
    made = run("federate", "init", "open", "--documents", "documents.csv", "--nodes", 1, "--insecure")
    assert made.code == 0, made.err
    ((_, server),) = commands("server", "open")
    ((_, client),) = commands("client", "open", "--data", "q.csv")
    assert "--insecure" in server
    assert "--insecure" in client
    assert "--auth-supernode-private-key" not in client


def test_encryption_cannot_be_left_out_on_a_network(fed):
    options = ("--documents", "documents.csv", "--nodes", 2, "--insecure", "--host", "192.0.2.7")
    check_refused(run("federate", "init", "open", *options), "ConfigError", "--insecure", "192.0.2.7")
    assert not Path("open").exists()


def test_a_folder_that_is_there_is_left_alone(fed):
    before = listing(fed)
    outcome = run("federate", "init", "fed", "--documents", "documents.csv", "--nodes", 2)
    check_refused(outcome, "StorageError", "never overwritten")
    assert listing(fed) == before


@pytest.mark.parametrize("nodes", [(), ("--node", "a", "--nodes", "2")])
def test_nodes_are_either_named_or_counted(fed, nodes):
    check_refused(run("federate", "init", "new", "--documents", "documents.csv", *nodes), "--nodes N", code=2)


@pytest.mark.parametrize("command", [("server",), ("client", "--data", "q.csv"), ("submit",), ("status",)])
def test_a_folder_of_something_else_is_one_line_and_exit_code_1(command, tmp_path):
    check_refused(run("federate", command[0], tmp_path, *command[1:]), "no caravan.toml there")


def test_a_node_of_another_name_is_refused(fed):
    outcome = run("federate", "client", fed, "--name", "pune", "--data", "q.csv")
    check_refused(outcome, "pune is not among deployment.nodes (lima, oslo)")


def test_a_node_without_its_key_does_not_start(fed):
    (fed / "nodes/oslo.key").unlink()
    check_refused(run("federate", "client", fed, "--name", "oslo", "--data", "q.csv"), "oslo.key: not there")


def answers(monkeypatch: pytest.MonkeyPatch, *given: dict) -> None:
    left = list(given)
    monkeypatch.setattr(operation, "_ask", lambda command: left.pop(0))

    class Silent:
        stdout = ("Traceback (most recent call last):\n", "caravan: round 1/1\n")

        def poll(self):
            return 0

        def wait(self, timeout=None):
            return 0

    monkeypatch.setattr(operation.Command, "start", lambda self, **options: Silent())


@pytest.mark.parametrize(
    ("status", "details", "code"),
    [
        ("finished:completed", "", 0),
        ("finished:failed", "ServerApp failed with exception: round 1: 0 of 2 clients sent a usable update", 1),
        ("finished:stopped", "Run stopped by user", 1),
    ],
)
def test_the_exit_code_is_the_runs_and_only_what_is_meant_for_people_is_shown(fed, monkeypatch, status, details, code):
    state = {"status": status, "status-details": details}
    answers(monkeypatch, {"run-id": "7"}, {"runs": [{"status": "running"}]}, {"runs": [state]})
    outcome = run("federate", "submit", fed)
    assert outcome.code == code
    assert outcome.out == "run 7 started\nround 1/1\n"
    assert (fed / "flower/runs/7.log").read_text(encoding="utf-8").startswith("Traceback")
    if code:
        reason = details.removeprefix("ServerApp failed with exception: ")
        assert outcome.err.startswith(f"FederationError: run 7 {status.split(':')[1]}: {reason} (all of it: ")


def test_status_lists_runs_and_nodes(fed, monkeypatch):
    runs = [{"run-id": "7", "status": "finished:failed", "status-details": "no nodes"}]
    nodes = [{"status": "online"}, {"status": "offline"}]
    answers(monkeypatch, {"runs": runs}, {"nodes": nodes})
    outcome = run("federate", "status", fed)
    assert (outcome.code, outcome.out) == (0, "nodes: 1 online of 2\nrun 7: finished:failed: no nodes\n")


def test_a_command_of_flower_that_fails_is_an_error_though_it_exits_with_0():
    code = 'print(\'{"success": false, "error-message": "Connection to the SuperLink is unavailable."}\')'
    command = operation.Command(["python", "-c", code])
    with pytest.raises(FederationError, match="Connection to the SuperLink is unavailable"):
        operation._ask(command)
