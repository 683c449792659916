from pathlib import Path

import pytest

from caravan.app.options import build_config, parse_settings
from caravan.config import Config
from caravan.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seed=3", 3),
        ("seed = 3 ", 3),
        ("head.scale=1e-3", 1e-3),
        ("head.hold_unseen=false", False),
        ('data.path="a b"', "a b"),
        ("data.path=a b", "a b"),
        ("data.path=a=b", "a=b"),
        ("data.path=", ""),
        ("data.label_separator=|", "|"),
        ('data.label_separator=" "', " "),
        ("data.path=caf\N{LATIN SMALL LETTER E WITH ACUTE}.csv", "caf\N{LATIN SMALL LETTER E WITH ACUTE}.csv"),
        ("seed=1\nhead.hidden = 2", "1\nhead.hidden = 2"),
        ("seed=" + "[" * 5000, "[" * 5000),
        ("seed=" + "9" * 5000, "9" * 5000),
    ],
)
def test_a_setting_is_toml_or_else_a_string(text: str, value: object):
    (parsed,) = parse_settings([text]).values()
    assert parsed == value
    assert type(parsed) is type(value)


def test_of_settings_with_the_same_key_the_last_one_holds():
    assert parse_settings(["seed=1", "seed=2"]) == {"seed": 2}
    assert parse_settings(None) == {}


@pytest.mark.parametrize("text", ["seed", "", "=3", " = 3"])
def test_a_setting_without_key_or_equals_sign_is_refused(text: str):
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_settings([text])


@pytest.fixture
def toml(tmp_path: Path) -> str:
    path = tmp_path / "my.toml"
    path.write_text('seed = 1\n[adapter]\nrank = 1\nkind = "core"\n[head]\nhidden = 1\n', encoding="utf-8")
    return str(path)


def test_nothing_given_is_the_defaults():
    assert build_config(None, None, {"seed": None}, last_stage={"epochs": None}) == Config()


def test_an_option_wins_over_set_and_set_over_the_file(toml: str):
    config = build_config(toml, ["adapter.rank=2", "head.hidden=2"], {"head.hidden": 3, "data.path": None})
    assert (config.seed, config.adapter.rank, config.head.hidden) == (1, 2, 3)
    assert config.adapter.kind == "core"
    assert config.data == Config().data


@pytest.mark.parametrize(
    ("in_file", "settings", "option", "stage"),
    [
        ("", [], None, "adapter"),
        ('training.mode = "head"', [], None, "head"),
        ('training.mode = "head"', ["training.mode=adapter"], None, "adapter"),
        ('training.mode = "adapter"', ["training.mode=adapter"], "head", "head"),
    ],
)
def test_epochs_go_to_the_last_stage_of_the_mode_that_holds(
    in_file: str, settings: list[str], option: str | None, stage: str, tmp_path: Path
):
    (tmp_path / "my.toml").write_text(in_file, encoding="utf-8")
    config = build_config(
        str(tmp_path / "my.toml"), settings, {"training.mode": option}, last_stage={"epochs": 77, "batch_size": None}
    )
    default = Config().training
    found = {"head": config.training.head.epochs, "adapter": config.training.adapter.epochs}
    assert found == {"head": default.head.epochs, "adapter": default.adapter.epochs, stage: 77}
    assert config.training.head.batch_size == default.head.batch_size


def test_a_fault_is_told_with_the_name_of_the_file_only_where_it_lies_in_it(toml: str):
    with pytest.raises(ConfigError, match=r"^the options: seed = -1"):
        build_config(toml, ["seed=-1"], {})
    Path(toml).write_text("seed = -1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"my\.toml: seed = -1"):
        build_config(toml, None, {})
    assert build_config(toml, ["seed=2"], {}).seed == 2


def test_an_unknown_mode_is_the_only_fault_told():
    with pytest.raises(ConfigError, match=r"training.mode = 'fast'") as caught:
        build_config(None, None, {"training.mode": "fast"}, last_stage={"epochs": 3})
    assert "unknown" not in str(caught.value)


def test_clients_and_a_column_that_names_them_contradict_each_other():
    column = {"federation.partition": "column", "federation.column": "site"}
    with pytest.raises(ConfigError, match=r"clients = 2 contradicts .*--partition-by"):
        build_config(None, ["federation.clients=2"], column)
    assert build_config(None, None, column).federation.clients == 0


def test_uneven_dealing_needs_clients():
    with pytest.raises(ConfigError, match=r"--dirichlet.*--clients"):
        build_config(None, None, {"federation.partition": "dirichlet"})
    assert build_config(None, ["federation.clients=2"], {"federation.partition": "dirichlet"}).federation.clients == 2
