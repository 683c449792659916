"""Settings that clients who do not pool their queries cannot meet."""

from caravan.config import Config
from caravan.errors import ConfigError
from caravan.training.rate import automatic
from caravan.training.trainer import Stage


def check_separation(config: Config, *, validation: bool) -> None:
    """Refuse what would need the clients' queries in one place, or something that is not there.

    Args:
        config: all settings.
        validation: whether there are validation queries that belong to no client.

    Raises:
        ConfigError: the start pools queries, a round is to be chosen without validation queries, or a rate without
            passages.
    """
    if config.head.start == "centroids":
        raise ConfigError('head.start = "centroids" would pool the clients\' queries; set it to "documents" or "auto"')
    if config.federation.keep == "best" and not validation:
        raise ConfigError(
            'federation.keep = "best" chooses by validation queries, and the data has none; give some '
            '(data.validation, data.validation_fraction) or set it to "last"'
        )
    stages: tuple[Stage, ...] = ("head", "adapter") if config.training.mode == "adapter" else ("head",)
    for stage in stages if config.training.passages == 0 else ():
        for name in automatic(config.training, stage):
            raise ConfigError(
                f'training.{stage}.{name} = "auto" is chosen on passages of the documents, which every client has, and '
                "training.passages = 0; raise it, or set the rate to a number"
            )
