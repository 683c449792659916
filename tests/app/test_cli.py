import csv
import json
import os
import re
import shutil
import signal
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from rich.text import Text

from caravan import __version__
from caravan.app import cli
from caravan.config import Config, changed, config_from_dict, read_config
from command_line import Workshop, check_refused, listing, run, run_program, start_program, write_table

ROOT = Path(__file__).parents[2]
TREE: Any = typer.main.get_command(cli.app)
GROUPS: dict[str, dict[str, click.Command]] = {
    name: command.commands for name, command in TREE.commands.items() if isinstance(command, click.Group)
}
COMMANDS: dict[str, click.Command] = {
    **{name: command for name, command in TREE.commands.items() if name not in GROUPS},
    **{f"{group} {name}": command for group, commands in GROUPS.items() for name, command in commands.items()},
}
# Every option of `train` that stands for a setting: what is written, and what it sets.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "DATA": ("other.csv", {"data.path": "other.csv"}),
    "--documents": ("--documents d.csv", {"data.documents": "d.csv"}),
    "--test": ("--test t.csv", {"data.test": "t.csv"}),
    "--text-column": ("--text-column q", {"data.text_column": "q"}),
    "--label-column": ("--label-column a", {"data.label_column": "a"}),
    "--on-bad-row": ("--on-bad-row skip", {"data.on_bad_row": "skip"}),
    "--seed": ("--seed 7", {"seed": 7}),
    "--backbone": ("--backbone folder", {"backbone.name": "folder"}),
    "--pooling": ("--pooling cls", {"backbone.pooling": "cls"}),
    "--device": ("--device cuda:1", {"backbone.device": "cuda:1"}),
    "--adapter": ("--adapter core", {"adapter.kind": "core"}),
    "--rank": ("--rank 3", {"adapter.rank": 3}),
    "--mode": ("--mode head", {"training.mode": "head"}),
    "--epochs": ("--epochs 9", {"training.adapter.epochs": 9}),
    "--batch-size": ("--batch-size 9", {"training.adapter.batch_size": 9}),
    "--learning-rate": ("--learning-rate 0.5", {"training.adapter.learning_rate": 0.5}),
    "--epochs of the head": ("--mode head --epochs 9", {"training.mode": "head", "training.head.epochs": 9}),
    "--clients": ("--clients 3", {"federation.clients": 3}),
    "--partition-by": ("--partition-by site", {"federation.partition": "column", "federation.column": "site"}),
    "--dirichlet": (
        "--dirichlet 0.5 --clients 2",
        {"federation.partition": "dirichlet", "federation.alpha": 0.5, "federation.clients": 2},
    ),
    "--rounds": ("--clients 2 --rounds 9", {"federation.clients": 2, "federation.rounds": 9}),
    "--clients-per-round": (
        "--clients 9 --clients-per-round 4",
        {"federation.clients": 9, "federation.clients_per_round": 4},
    ),
    "--secure-aggregation": (
        "--clients 9 --secure-aggregation",
        {"federation.clients": 9, "federation.secure_aggregation": True},
    ),
    "--epsilon": ("--epsilon 3", {"privacy.mode": "dp-sgd", "privacy.epsilon": 3.0, "head.hidden": 0}),
    "--strategy": (
        "--clients 9 --strategy trimmed_mean",
        {"federation.clients": 9, "federation.strategy": "trimmed_mean"},
    ),
    "--baselines": ("--no-baselines", {"evaluation.baselines": False}),
    "--set": ("--set head.hidden=5", {"head.hidden": 5}),
}
OTHER_OPTIONS = {"--out", "--config", "--report", "--resume", "--print-config", "--json", "--help"}


def shown(command: str) -> str:
    outcome = run(*command.split(), "--help")
    assert outcome.code == 0
    return outcome.out


def test_the_commands_are_those_of_the_manual():
    names = [
        *("demo", "train", "evaluate", "compare", "compare communication", "search", "info"),
        *("ask", "personalise", "doctor", "serve", "mcp", "reproduce"),
        *("improve", "versions", "rollback", "federate", "privacy"),
    ]
    assert list(TREE.commands) == names
    groups = {name: list(commands) for name, commands in GROUPS.items()}
    assert groups == {
        "federate": ["init", "server", "client", "submit", "status"],
        "privacy": ["plan", "ledger", "audit"],
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_argument_and_option_has_help_that_is_shown(name: str):
    text = shown(name)
    command = COMMANDS[name]
    assert command.help
    assert command.help.splitlines()[0].strip() in " ".join(text.split())
    for parameter in command.params:
        words = getattr(parameter, "help", None)
        assert words, f"{name} {parameter.name}"
        assert Text.from_markup(words).plain == words, f"{name} {parameter.name}: brackets that Rich takes for markup"
        assert words.split()[0].strip(",.") in text
        assert max(parameter.opts, key=len) in text or parameter.param_type_name == "argument"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_that_can_be_parsed(name: str):
    examples = [line.split() for line in shown(name).splitlines() if line.strip().startswith(f"caravan {name}")]
    assert examples
    for example in examples:
        words = example[1 + len(name.split()) :]
        given = words[: words.index(">")] if ">" in words else words
        with COMMANDS[name].make_context(name, given) as context:
            assert context.params


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str):
    assert f"caravan {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("federate server", "federate client")])
def test_every_command_that_ends_can_answer_in_json(name: str):
    assert "--json" in {option for parameter in COMMANDS[name].params for option in parameter.opts}


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_that_of_wrong_usage():
    outcome = run()
    assert (outcome.code, outcome.err) == (2, "")
    assert outcome.out.rstrip() == run("--help").out.rstrip()
    assert "caravan train helpdesk" in outcome.out


def test_the_version_is_printed():
    assert run("--version").out == f"caravan {__version__}\n"


def test_a_completion_script_can_be_shown():
    # Else Typer asks what the parent process is, which under make or CI is a shell without completion.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = run_program("--show-completion", "bash", settings=named)
    assert done.code == 0, done.err
    assert "_CARAVAN_COMPLETE=complete_bash" in done.out


def settings(*arguments: object) -> Config:
    outcome = run("train", *arguments, "--print-config")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    return config_from_dict(tomllib.loads(outcome.out))


def test_every_option_of_train_is_known_to_these_tests():
    declared = {max(parameter.opts, key=len) for parameter in COMMANDS["train"].params if parameter.name != "data"}
    assert declared == {name for name in OPTIONS if name.isascii() and " " not in name} - {"DATA"} | OTHER_OPTIONS - {
        "--help"
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_sets_what_it_names_and_nothing_else(option: str):
    written, expected = OPTIONS[option]
    assert settings(*written.split()) == config_from_dict(changed({}, expected))


def test_printed_settings_give_the_same_settings_when_read(here: Path):
    given = ("x.csv", "--mode", "head", "--epochs", "3", "--clients", "2", "--set", 'data.label_separator=" "')
    (here / "my.toml").write_text(run("train", *given, "--print-config").out, encoding="utf-8")
    assert settings("-c", "my.toml") == settings(*given)
    assert run("train", "-c", "my.toml", "--print-config").out == (here / "my.toml").read_text(encoding="utf-8")
    assert json.loads(run("train", "-c", "my.toml", "--print-config", "--json").out) == settings(*given).to_dict()


def test_an_option_wins_over_set_and_set_over_the_file(here: Path):
    (here / "my.toml").write_text("seed = 1\n[adapter]\nrank = 1\n[head]\nhidden = 1\n", encoding="utf-8")
    config = settings("-c", "my.toml", "--set", "adapter.rank=2", "--set", "seed=2", "--seed", "3")
    assert (config.seed, config.adapter.rank, config.head.hidden) == (3, 2, 1)


def test_a_column_of_clients_wins_over_a_number_of_clients_in_the_file(here: Path):
    (here / "my.toml").write_text("[federation]\nclients = 3\n", encoding="utf-8")
    federation = settings("-c", "my.toml", "--partition-by", "site", "--rounds", "2").federation
    assert (federation.clients, federation.partition, federation.column) == (0, "column", "site")


def test_a_place_for_the_result_must_be_named():
    check_refused(run("train"), "--out", "my-retriever", code=2)


def only_json(*arguments: object, stdin: bytes = b"") -> Any:
    outcome = run(*arguments, "--json", stdin=stdin)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return json.loads(outcome.out)


def recall(answer: Any) -> dict[str, float]:
    return {name: row["metrics"]["recall@1"]["value"] for name, row in answer["rows"].items()}


def test_train_answers_with_one_json_object_and_evaluate_and_compare_measure_the_same(workshop: Workshop, here: Path):
    trained = only_json("train", "-c", workshop.quick, "-o", "a/model", "--mode", "adapter")
    assert (trained["dataset"], trained["split"], trained["model"]) == ("letters", "test", "a/model")
    assert list(trained["rows"]) == ["head", "adapter"]
    assert trained["latency"].keys() == {"encode_ms", "search_ms", "search_p95_ms"}
    measured = only_json("evaluate", "a/model")
    assert recall(measured) == {"model": recall(trained)["adapter"]}
    both = only_json("compare", "a/model", workshop.model, "--baselines")
    assert list(both["rows"]) == [
        *("BM25", "MIPS", "centroids", "1-NN", "output adapter"),
        *("a/model", str(workshop.model)),
    ]
    assert recall(both)["a/model"] == recall(trained)["adapter"]
    assert recall(both)[str(workshop.model)] == recall(only_json("evaluate", workshop.model))["model"]
    os.chdir("a/model")
    assert recall(only_json("compare", ".", ".")) == {
        ".": recall(trained)["adapter"],
        ". (2)": recall(trained)["adapter"],
    }
    assert list(only_json("evaluate", ".")["rows"]) == ["model"]


def test_search_and_info_answer_with_one_json_object(workshop: Workshop):
    (result,) = only_json("search", workshop.model, "a b c", "-k", "2")["results"]
    assert result["query"] == "a b c"
    assert [hit["rank"] for hit in result["hits"]] == [1, 2]
    assert result["hits"][0].keys() == {"rank", "doc_id", "score", "probability", "title", "text"}
    assert only_json("info", workshop.model)["documents"] == 5
    assert only_json("info")["caravan"] == __version__


def test_search_reads_standard_input_where_no_query_is_given(workshop: Workshop):
    asked = only_json("search", workshop.model, stdin="  a b c\r\n\n\N{SNOWMAN} k l\n".encode())
    assert asked == only_json("search", workshop.model, "a b c", "\N{SNOWMAN} k l")
    check_refused(run("search", workshop.model, stdin=b"a b\n\xff\xfe c\n"), "text 2 of 2 holds a lone surrogate")
    check_refused(run("search", workshop.model, stdin=b"\n  \n"), "at least one query", code=2)


def test_a_table_a_report_and_the_saved_record_agree(workshop: Workshop, here: Path):
    options = ("-c", workshop.quick, "-o", "out", "--baselines", "--report", "results/first")
    outcome = run("train", *options)
    assert outcome.code == 0, outcome
    assert "Error" not in outcome.err  # hints may stand there
    assert outcome.out.endswith("Saved to out.\nReport written to results/first.\n")
    report = here / "results/first"
    names = ["BM25", "MIPS", "centroids", "1-NN", "output adapter", "head"]
    runs = [f"{name.replace(' ', '-')}.run" for name in names]
    assert sorted(path.name for path in report.iterdir()) == sorted(
        [*runs, "qrels.txt", "recall.png", "recall.svg", "results.json", "table.md"]
    )
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    assert list(results["rows"]) == names
    assert results["rows"] == json.loads((here / "out/training.json").read_text(encoding="utf-8"))["metrics"]
    table = (report / "table.md").read_text(encoding="utf-8")
    gold = dict(line.split()[::2] for line in (report / "qrels.txt").read_text(encoding="utf-8").splitlines())
    assert len(gold) == 12
    for name, file in zip(names, runs, strict=True):
        first = [line.split() for line in (report / file).read_text(encoding="utf-8").splitlines()]
        right = sum(gold[query] == document for query, _, document, rank, *_ in first if rank == "1")
        assert results["rows"][name]["metrics"]["recall@1"]["value"] == pytest.approx(right / 12)
        assert re.search(rf"^\s*{name} +{100 * right / 12:.1f} \[", outcome.out, re.MULTILINE)
        assert f"| {name} | {100 * right / 12:.1f} [" in table


def test_skipped_rows_are_counted_on_the_screen_and_in_the_record(workshop: Workshop, here: Path):
    shutil.copytree(workshop.data, here / "data")
    with (here / "data/train.csv").open("a", encoding="utf-8") as stream:
        stream.write(",d0,north\na b,d9,north\none cell\n")
    train = ("train", "data", "-c", workshop.quick, "-o", "out")
    check_refused(run(*train), "train.csv, line 42: 'text' is empty")
    outcome = run(*train, "--on-bad-row", "skip")
    assert outcome.code == 0, outcome.err
    assert "\n3 malformed rows were skipped.\n" in outcome.out
    assert only_json("info", "out")["dataset"]["skipped"] == 3


def test_a_table_of_other_columns_without_test_or_documents_is_measured_on_what_is_held_back(
    workshop: Workshop, here: Path
):
    with (workshop.data / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = [(row["label"], row["text"]) for row in csv.DictReader(stream)]
    write_table(here / "faq.tsv.csv", ("answer", "question"), rows)
    columns = ("--text-column", "question", "--label-column", "answer")
    trained = only_json("train", "faq.tsv.csv", "-c", workshop.quick, "-o", "out", *columns)
    assert trained["split"] == "validation"
    assert recall(only_json("evaluate", "out")) == {"out": recall(trained)["head"]}
    check_refused(run("train", "faq.tsv.csv", "-c", workshop.quick, "-o", "out", *columns[2:]), "no column 'text'")


def test_federated_training_by_column_names_its_clients(workshop: Workshop):
    trained = only_json("train", "-c", workshop.quick, "-o", "out", "--partition-by", "site", "--rounds", "2")
    assert list(trained["rows"]) == ["federated head"]
    facts = only_json("info", "out")
    assert facts["clients"].keys() == {"north", "south"}
    assert sum(facts["clients"].values()) == 36
    assert facts["rounds"] == 2
    rounds = json.loads(Path("out/training.json").read_text(encoding="utf-8"))["federation"]["rounds"]
    for direction, mib in facts["sent_mib"].items():
        by_client = [each["traffic"][site][direction] for each in rounds for site in ("north", "south")]
        assert mib == round(sum(by_client) / 2**20, 3) > 0


def test_unusual_characters_do_not_stop_a_terminal_that_cannot_show_them(workshop: Workshop, here: Path):
    shutil.copytree(workshop.data, here / "data")
    documents = (
        (here / "data/documents.csv").read_text(encoding="utf-8").replace("Letters d0", "\N{SNOWMAN}\u202e\x1b[2J")
    )
    (here / "data/documents.csv").write_text(documents, encoding="utf-8")
    assert run("train", "data", "-c", workshop.quick, "-o", "out").code == 0
    outcome = run("search", "out", "a \N{PILE OF POO} c", "\N{CJK UNIFIED IDEOGRAPH-4E2D}", encoding="ascii")
    assert (outcome.code, outcome.err) == (0, "")
    assert "a \\U0001f4a9 c" in outcome.out
    assert "\\u2603" in outcome.out
    assert "\x1b" not in outcome.out
    for command in (("info", "out"), ("evaluate", "out"), ("search", "out", "a\N{SNOWMAN}", "--json")):
        assert run(*command, encoding="ascii").code == 0


def test_odd_names_of_folders_are_only_names(workshop: Workshop, here: Path):
    shutil.copytree(workshop.data, here / "data\udcff")
    assert run("train", "data\udcff", "-c", workshop.quick, "-o", "[red]$x|").code == 0
    outcome = run("evaluate", "[red]$x|", "--report", "report")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert "\n[red]$x| " in outcome.out
    assert "| [red]$x\\| |" in (here / "report/table.md").read_text(encoding="utf-8")
    assert (here / "report/[red]$x|.run").exists()


def test_a_report_beside_the_retriever_in_its_own_folder_is_kept_by_the_next_training(workshop: Workshop, here: Path):
    train = ("train", "-c", workshop.quick, "-o", "out", "--report", "out/report")
    for _ in range(2):
        assert run(*train).code == 0
    assert (here / "out/report/table.md").exists()
    assert only_json("info", "out")["documents"] == 5


def test_a_bug_is_not_passed_off_as_a_lack_of_memory(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    for error, code in ((RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1), (MemoryError(), 1)):
        monkeypatch.setattr("caravan.storage.load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        check_refused(run("search", workshop.model, "a"), "BudgetError: not enough memory", code=code)
    monkeypatch.setattr("caravan.storage.load", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("search", workshop.model, "a")


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("train", "--epochs", "-1", "-o", "out"), "training.adapter.epochs = -1", 1),
        (("train", "-c", b"no\xff.toml", "-o", "out"), "no\\udcff.toml: cannot read the settings", 1),
        (("train", "--rounds", "2"), "--rounds", 2),
        (("search",), "MODEL", 2),
    ],
)
def test_the_installed_program_ends_bad_input_as_the_function_does(
    arguments: tuple[str | bytes, ...], says: str, code: int, here: Path
):
    check_refused(run_program(*arguments), says, code=code)
    assert listing(here) == {}


def test_the_installed_program_searches_for_a_terminal_of_ascii_only(workshop: Workshop):
    query = os.fsencode("caf\N{LATIN SMALL LETTER E WITH ACUTE}")
    done = run_program("search", str(workshop.model), query, settings={"PYTHONIOENCODING": "ascii"})
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("caf\\xe9\n  1. ")


@pytest.mark.parametrize("arguments", [("train", "--print-config"), ("--help",), ("train", "--help")])
def test_a_reader_that_stops_reading_causes_no_complaint(arguments: tuple[str, ...]):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stream:
        process = start_program(*arguments, stdout=stream)
    _, errors = process.communicate()
    assert errors == b""
    assert process.returncode in (1, -signal.SIGPIPE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line():
    with Path("/dev/full").open("wb") as full:
        done = run_program("train", "--print-config", stdout=full)
    assert done.code == 1
    assert done.err.startswith("OSError: ")
    assert "No space left on device" in done.err
    assert done.err.count("\n") == 1


def test_read_config_takes_what_print_config_wrote(here: Path):
    (here / "my.toml").write_text(run("train", "--print-config").out, encoding="utf-8")
    assert read_config(here / "my.toml") == Config()
