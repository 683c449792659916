"""Settings from a TOML file, `--set KEY=VALUE` and single options, the later winning over the earlier."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from caravan.config import Config, changed, config_from_dict, read_toml
from caravan.errors import ConfigError


def build_config(
    file: str | None,
    settings: Sequence[str] | None,
    options: Mapping[str, Any],
    *,
    last_stage: Mapping[str, Any] | None = None,
) -> Config:
    """Join all sources of settings.

    Args:
        file: a TOML file, or None.
        settings: `KEY=VALUE` texts; VALUE is TOML, or a bare string.
        options: dotted key to value; None means not given.
        last_stage: settings of the stage that the mode ends with, by their plain names; None means not given.

    Raises:
        ConfigError: a source cannot be read, or a setting is unknown or not allowed.
    """
    values = read_toml(file) if file is not None else {}
    changes = parse_settings(settings)
    changes.update({key: value for key, value in options.items() if value is not None})
    values = changed(values, changes)
    training = values.get("training")
    stage = training.get("mode", "adapter") if isinstance(training, dict) else "adapter"
    last = {f"training.{stage}.{name}": value for name, value in (last_stage or {}).items() if value is not None}
    return config_from_dict(changed(values, last), source=file or "the settings")


def parse_settings(texts: Sequence[str] | None) -> dict[str, Any]:
    """Turn `KEY=VALUE` texts into dotted keys and values; a VALUE that is no TOML is taken as a string.

    Raises:
        ConfigError: a text has no key or no equals sign.
    """
    settings = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: write it as KEY=VALUE, e.g. --set training.adapter.epochs=8")
        settings[key.strip()] = _parse(value.strip())
    return settings


def _parse(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
