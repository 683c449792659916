"""Settings from a TOML file, `--set KEY=VALUE` and single options, the later winning over the earlier."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from caravan.config import Config, changed, config_from_dict, read_toml
from caravan.errors import ConfigError

_OPTIONS = "the options"


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
        ConfigError: a source cannot be read, a setting is unknown or not allowed, or two contradict each other.
    """
    from_file = read_toml(file) if file is not None else {}
    changes = parse_settings(settings)
    changes.update({key: value for key, value in options.items() if value is not None})
    values = changed(from_file, changes)
    training = values.get("training")
    stage = training.get("mode", Config().training.mode) if isinstance(training, dict) else Config().training.mode
    if stage in ("head", "adapter"):  # else the mode itself is the fault to be told
        given = {name: value for name, value in (last_stage or {}).items() if value is not None}
        values = changed(values, {f"training.{stage}.{name}": value for name, value in given.items()})
    try:
        config = config_from_dict(values, source=_OPTIONS)
    except ConfigError:
        if file is not None:
            config_from_dict(from_file, source=file)  # a fault of the file itself is told with its name
        raise
    _check_clients(config, file or _OPTIONS)
    return config


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
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return value
    return parsed["value"] if len(parsed) == 1 else value  # a line break in it would begin a second key


def _check_clients(config: Config, source: str) -> None:
    """Refuse settings of which one would silently be passed over."""
    clients, partition = config.federation.clients, config.federation.partition
    if partition == "column" and clients:
        raise ConfigError(
            f'{source}: federation.clients = {clients} contradicts federation.partition = "column" (--partition-by), '
            f"which makes one client of each value in the column; leave one of them out"
        )
    if partition == "dirichlet" and not clients:
        raise ConfigError(
            f'{source}: federation.partition = "dirichlet" (--dirichlet) deals queries to clients, and there are none; '
            f"set federation.clients (--clients)"
        )
