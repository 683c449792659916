"""Settings that clients who do not pool their queries cannot meet."""

from caravan.config import Config
from caravan.errors import ConfigError


def check_separation(config: Config, *, validation: bool) -> None:
    """Refuse what would need the clients' queries in one place, or something that is not there.

    Args:
        config: all settings.
        validation: whether there are validation queries that belong to no client.

    Raises:
        ConfigError: the start pools queries, or a round is to be chosen without validation queries.
    """
    if config.head.start == "centroids":
        raise ConfigError('head.start = "centroids" would pool the clients\' queries; set it to "documents" or "auto"')
    if config.federation.keep == "best" and not validation:
        raise ConfigError(
            'federation.keep = "best" chooses by validation queries, and the data has none; give some '
            '(data.validation, data.validation_fraction) or set it to "last"'
        )
