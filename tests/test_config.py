import tomllib
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caravan.config import Config, StrategyName, TrainingConfig, changed, config_from_dict, read_config, read_toml
from caravan.errors import ConfigError

BOUNDED = {
    "seed": (0, -1),
    "data.validation_fraction": (0.0, 1.0),
    "backbone.max_tokens": (1, 0),
    "adapter.rank": (1, 0),
    "adapter.seed": (2**63 - 1, 2**63),
    "head.hidden": (0, -1),
    "head.scale": (1e-9, 0.0),
    "training.head.epochs": (0, -1),
    "training.adapter.batch_size": (1, 0),
    "training.head.learning_rate": (1e-9, 0.0),
    "training.adapter.head_learning_rate": (1e-9, float("nan")),
    "training.head.weight_decay": (0.0, -0.1),
    "training.head.label_smoothing": (0.99, 1.0),
    "training.max_gradient_norm": (0.5, float("inf")),
    "training.patience": (0, -1),
    "training.warmup": (0.0, 1.0),
    "training.checkpoint_seconds": (0.1, 0),
    "privacy.epsilon": (1e-9, 0.0),
    "privacy.noise_multiplier": (0.0, -0.1),
    "privacy.delta": (1e-9, 1.0),
    "privacy.clip": (1e-9, 0.0),
    "privacy.batch": (1, 0),
    "privacy.examples_per_user": (1, 0),
    "privacy.quantile": (0.99, 1.0),
    "privacy.clip_rate": (1e-9, 0.0),
    "privacy.epsilon_cap": (1e-9, float("inf")),
    "privacy.paper_noise": (0.0, -0.1),
    "privacy.paper_decay": (0.0, 1.0),
    "privacy.paper_quantile": (1.0, 0.0),
    "privacy.paper_warmup": (0, -1),
    "federation.clients": (0, -1),
    "federation.alpha": (0.1, 0.0),
    "federation.rounds": (1, 0),
    "federation.clients_per_round": (1, 0),
    "federation.min_clients": (1, 0),
    "federation.round_retries": (0, -1),
    "federation.round_seconds": (0.1, 0.0),
    "federation.codec": ("int8", "zip"),
    "federation.sparse_rows": (True, "rows"),
    "federation.max_update_norm": (1e-9, 0.0),
    "federation.max_examples": (1, 0),
    "federation.proximal_mu": (1e-9, 0.0),
    "federation.server_learning_rate": (1e-9, float("inf")),
    "federation.server_momentum": (0.0, 1.0),
    "federation.server_second_momentum": (0.0, 1.0),
    "federation.server_adaptivity": (1e-9, 0.0),
    "federation.byzantine_clients": (0, -1),
    "federation.trimmed_share": (0.49, 0.5),
    "federation.krum_selected": (1, 0),
    "evaluation.bootstrap": (0, -1),
}
CHOICES = {
    "data.on_bad_row": ("fail", "skip"),
    "backbone.dtype": ("float32", "bfloat16", "float16"),
    "backbone.pooling": ("auto", "mean", "last", "cls"),
    "adapter.kind": ("full", "lowrank", "core", "none"),
    "head.start": ("auto", "documents", "centroids"),
    "training.mode": ("head", "adapter"),
    "training.optimizer": ("adamw", "sgd"),
    "training.precision": ("auto", "float32", "bfloat16"),
    "training.class_weights": ("none", "sqrt", "balanced"),
    "privacy.mode": ("none", "dp-sgd", "dp-sgd-adaptive", "paper"),
    "privacy.unit": ("example", "user"),
    "privacy.paper_clipping": ("batch", "example"),
    "federation.partition": ("iid", "dirichlet"),
    "federation.backend": ("inprocess", "ray"),
    "federation.strategy": get_args(StrategyName),
    "federation.keep": ("last", "best"),
}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """All settings of a config by dotted key."""
    if not is_dataclass(value):
        return {path: value}
    found = {}
    for field in fields(value):
        found |= leaves(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    return found


def with_setting(key: str, value: Any) -> Config:
    return config_from_dict(changed({}, {key: value}))


def test_no_settings_are_the_defaults():
    assert config_from_dict({}) == Config()


def test_settings_cannot_be_changed_once_made():
    with pytest.raises(FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("key", BOUNDED)
def test_a_number_is_allowed_up_to_its_bound_and_refused_beyond(key: str):
    allowed, refused = BOUNDED[key]
    assert leaves(with_setting(key, allowed))[key] == allowed
    with pytest.raises(ConfigError, match=rf"^the settings: {key} = "):
        with_setting(key, refused)


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_takes_its_names_and_no_other(key: str):
    for name in CHOICES[key]:
        assert leaves(with_setting(key, name))[key] == name
    with pytest.raises(ConfigError, match=f"{key} = 'nonsense': input should be .*'{CHOICES[key][-1]}'"):
        with_setting(key, "nonsense")


def test_every_section_refuses_a_setting_that_it_does_not_know():
    sections = {key.rpartition(".")[0] for key in leaves(Config())}
    assert {"", "data", "training", "training.adapter"} <= sections
    for section in sections:
        key = f"{section}.nonsense".lstrip(".")
        with pytest.raises(ConfigError, match=f"unknown setting {key}; .*--print-config"):
            with_setting(key, 1)


@pytest.mark.parametrize("value", [5, "head", [1], None])
def test_a_value_where_a_section_belongs_is_refused(value: Any):
    with pytest.raises(ConfigError, match=r"^the settings: training = "):
        config_from_dict({"training": value})


def test_all_faults_are_named_on_one_line_with_their_source():
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"seed": "x\ny", "data": {"sead": 1}, "head": {"scale": -1}}, source="my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    assert "\n" not in message
    for part in ("seed = 'x\\ny'", "unknown setting data.sead", "head.scale = -1"):
        assert part in message


def test_a_long_wrong_value_is_cut():
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"seed": "a" * 100_000})
    assert "seed = 'aaa" in str(caught.value)
    assert len(str(caught.value)) < 250


def test_one_client_a_value_needs_the_name_of_the_column():
    with pytest.raises(ConfigError, match=r"needs federation.column"):
        config_from_dict({"federation": {"partition": "column"}})
    config = config_from_dict({"federation": {"partition": "column", "column": "site"}})
    assert config.federation.column == "site"


def test_toml_holds_every_setting_that_is_not_none_and_reads_back_as_the_same(tmp_path: Path):
    values = {"seed": 7, "data": {"path": 'a "b"\nc', "documents": "d.csv"}, "training": {"head": {"epochs": 3}}}
    config = config_from_dict(values)
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert read_config(tmp_path / "c.toml") == config
    written = tomllib.loads(config.to_toml())
    for key, value in leaves(config).items():
        place: Any = written
        *sections, name = key.split(".")
        for section in sections:
            place = place[section]
        assert place.get(name) == (list(value) if isinstance(value, tuple) else value)  # TOML knows no tuples


@given(st.data())
def test_any_valid_settings_survive_the_way_through_toml(data: st.DataObject):
    changes: dict[str, Any] = {key: data.draw(st.sampled_from(names), key) for key, names in CHOICES.items()}
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    changes |= {"data.path": data.draw(text), "backbone.name": data.draw(text), "data.label_separator": data.draw(text)}
    changes |= {"seed": data.draw(st.integers(0, 2**63 - 1)), "head.scale": data.draw(st.floats(1e-300, 1e300))}
    config = config_from_dict(changed({}, changes))
    assert config_from_dict(tomllib.loads(config.to_toml())) == config


def test_plain_values_are_nested_by_section():
    values = Config().to_dict()
    assert values["training"]["adapter"]["epochs"] == TrainingConfig().adapter.epochs
    assert config_from_dict(values) == Config()


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfseed = 4\r\n")
    assert read_config(tmp_path / "c.toml").seed == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"seed = \n", "not valid TOML: .*line 1"),
        (b"seed = 1\nseed = 2\n", "not valid TOML: .*line 2"),
        (b"seed = 1 # \xff", "not UTF-8"),
        (b"seed = " + b"[" * 5000, "not valid TOML: .*recursion"),
        (b"seed = " + b"9" * 5000, "not valid TOML: .*4300 digits"),
        (b"sead = 1", "unknown setting sead"),
    ],
)
def test_a_file_that_is_no_valid_toml_is_refused_by_name(content: bytes, says: str, tmp_path: Path):
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"c.toml: {says}"):
        read_config(tmp_path / "c.toml")


def test_a_file_that_cannot_be_opened_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no\.toml: cannot read the settings: No such file"):
        read_toml(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_toml(tmp_path)


def test_changes_by_dotted_key_make_sections_and_leave_the_original_alone():
    values = {"seed": 1, "training": {"mode": "head", "head": {"epochs": 3}}}
    result = changed(values, {"training.head.epochs": 5, "data.path": "x", "seed": 2})
    assert result == {"seed": 2, "training": {"mode": "head", "head": {"epochs": 5}}, "data": {"path": "x"}}
    assert values == {"seed": 1, "training": {"mode": "head", "head": {"epochs": 3}}}


def test_a_change_through_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"training.mode.fast: mode is a value, not a section"):
        changed({"training": {"mode": "head"}}, {"training.mode.fast": True})


def test_noise_changes_the_defaults_of_what_is_left_out_and_nothing_that_is_set():
    plain = config_from_dict({"privacy": {"mode": "none"}})
    noised = config_from_dict({"privacy": {"mode": "dp-sgd", "epsilon": 3.0}, "training": {"head": {"dropout": 0.3}}})
    assert plain == Config()
    assert (noised.head.hidden, noised.training.head.learning_rate) == (0, 3e-2)
    assert noised.training.head.dropout == 0.3
    assert config_from_dict(noised.to_dict()) == noised  # what is saved is what was trained with


def test_noised_defaults_do_not_hide_a_fault():
    with pytest.raises(ConfigError, match="training"):
        config_from_dict({"privacy": {"mode": "dp-sgd"}, "training": 3})
