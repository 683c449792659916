import json

import numpy as np
import pytest

from caravan.errors import FederationError
from caravan.federation.traffic import ByteLedger


def two_rounds() -> ByteLedger:
    ledger = ByteLedger()
    ledger.add(2, down=500)
    ledger.add(1, up=30, client="oslo")
    ledger.add(1, up=4, down=100, client="lima")
    ledger.add(1, up=1, client="oslo")
    ledger.add(1, down=7)
    return ledger


def test_bytes_add_up_by_round_direction_and_client():
    assert two_rounds().to_json() == [
        {"round": 1, "up": 35, "down": 107, "clients": {"oslo": {"up": 31, "down": 0}, "lima": {"up": 4, "down": 100}}},
        {"round": 2, "up": 0, "down": 500},
    ]
    assert (two_rounds().up, two_rounds().down) == (35, 607)


def test_a_new_ledger_is_empty():
    assert (ByteLedger().up, ByteLedger().down, ByteLedger().to_json()) == (0, 0, [])


def test_a_ledger_goes_on_where_it_was_written_down():
    ledger = ByteLedger.from_json(json.loads(json.dumps(two_rounds().to_json())))
    assert ledger.to_json() == two_rounds().to_json()
    ledger.add(2, up=5, client="oslo")
    assert (ledger.up, ledger.down) == (40, 607)


def test_what_to_json_gives_is_a_copy():
    ledger = two_rounds()
    ledger.to_json()[0]["clients"]["oslo"]["up"] = 0
    assert ledger.to_json() == two_rounds().to_json()


@pytest.mark.parametrize(
    ("number", "counts", "reason"),
    [
        (0, {}, "round is 0; a whole number from 1 on"),
        ("1", {}, "round is '1'"),
        (1, {"up": -1}, "up is -1; a whole number from 0 on"),
        (1, {"down": 2.0}, r"down is 2\.0"),
        (1, {"up": True}, "up is True"),
        (1, {"up": np.int64(3)}, "up is np"),
    ],
)
def test_what_is_no_count_is_refused_and_changes_nothing(number, counts, reason):
    ledger = ByteLedger()
    with pytest.raises(FederationError, match=reason):
        ledger.add(number, **counts)
    assert ledger.to_json() == []


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([3], "a row cannot be read"),
        (None, "a row cannot be read"),
        ([{"round": 1, "up": 1}], "a row cannot be read"),
        ([{"round": 1, "up": 1, "down": 1, "clients": 3}], "a row cannot be read"),
        ([{"round": 1, "up": "1", "down": 1}], "up is '1'"),
        ([{"round": 1, "up": 1, "down": 1, "clients": {"oslo": {"up": 2, "down": 0}}}], "up is -1"),
    ],
)
def test_rows_that_no_ledger_wrote_are_refused(rows, reason):
    with pytest.raises(FederationError, match=reason):
        ByteLedger.from_json(rows)
