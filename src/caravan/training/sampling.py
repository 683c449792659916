"""Which units a private step sees: each by itself with the same probability, as the accountant assumes."""

from collections.abc import Sequence

from caravan.config import PrivacyConfig
from caravan.data.records import Example
from caravan.errors import PrivacyError
from caravan.training.noise import NoiseSource


def units_of(examples: Sequence[Example], config: PrivacyConfig) -> list[list[int]]:
    """Say whose examples are whose.

    Args:
        examples: N of them.
        config: its `unit` decides: each example by itself, or all that have the same value in `user_column`.

    Returns:
        For each unit the numbers of its examples; together each number from 0 to N - 1 once.

    Raises:
        PrivacyError: a user is asked for, and the column is not named or an example has no value there.
    """
    if config.unit == "example":
        return [[number] for number in range(len(examples))]
    column = config.user_column
    if column is None:
        raise PrivacyError('privacy.unit = "user" needs privacy.user_column, the name of the column that names users')
    users: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        user = example.columns.get(column)
        if not user:
            raise PrivacyError(
                f'query {example.query_id or number + 1} has no value in the column "{column}", which names users; '
                'fill it in, or set privacy.unit = "example"'
            )
        users.setdefault(user, []).append(number)
    return list(users.values())


def sampling_rate(units: int, batch: int) -> float:
    """Give the probability with which each of `units` is in a step that is to see `batch` on average.

    The number of units counts as public here and in `steps_per_epoch`: only whose they are is protected.
    """
    return min(1.0, batch / units)


def steps_per_epoch(units: int, batch: int) -> int:
    """Give how many such steps see each unit about once on average: at least one."""
    return max(1, round(units / batch))


def draw(units: Sequence[Sequence[int]], rate: float, most: int, source: NoiseSource) -> list[list[int]]:
    """Draw a logical batch: each unit independently with probability `rate` (Poisson sampling).

    Args:
        units: for each unit the numbers of its examples.
        rate: from 0 to 1.
        most: of a drawn unit's examples, at most so many, chosen evenly among all.
        source: who draws.

    Returns:
        The drawn units' examples; none at all is a draw like any other.
    """
    chosen = (source.uniforms(len(units)) < rate).nonzero().squeeze(1).tolist()
    drawn = []
    for unit in chosen:
        own = list(units[unit])
        if len(own) > most:
            own = [own[place] for place in source.uniforms(len(own)).argsort()[:most].tolist()]
        drawn.append(own)
    return drawn


def physical_batches(drawn: Sequence[Sequence[int]], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut a logical batch into batches that fit into memory, units whole and of like length together.

    Args:
        drawn: the drawn units' examples.
        lengths: token counts by example.
        size: examples a batch; only a unit that has more by itself exceeds it.

    Returns:
        Lists of example numbers, the examples of a unit next to each other.
    """
    batches: list[list[int]] = []
    for own in sorted(drawn, key=lambda own: max(lengths[number] for number in own)):
        if not batches or len(batches[-1]) + len(own) > size:
            batches.append([])
        batches[-1].extend(own)
    return batches
