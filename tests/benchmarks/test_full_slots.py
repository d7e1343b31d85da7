"""benchmarks/full_slots.py: the passes of the engine's schedule beside those of a greedy refill and of waves."""

import json

import full_slots
import pytest


def test_the_engine_needs_hardly_more_passes_than_a_greedy_refill(capsys):
    full_slots.main(["--slots", "16", "--prompts", "8", "--seeds", "1", "--json"])
    kinds = json.loads(capsys.readouterr().out)["kinds"]
    assert set(kinds) == set(full_slots.KINDS)
    for kind, found in kinds.items():
        assert 1 <= found["continuous / greedy"] <= 1.05, kind
        assert found["waves / greedy"] == found["waves"] / found["greedy"]
    assert kinds["lognormal"]["waves / greedy"] > 1.3 and kinds["half cut"]["waves / greedy"] > 1.1


@pytest.mark.parametrize(
    ("wanted", "slots", "passes"),
    [([5, 5], 2, 4), ([5, 5], 1, 8), ([1, 1], 1, 0), ([9, 3, 3], 2, 8), ([3, 3, 9], 2, 10)],
)
def test_a_greedy_refill_gives_the_first_free_slot_to_the_next(wanted, slots, passes):
    assert full_slots.greedy(wanted, slots) == passes


def test_waves_last_as_long_as_their_longest():
    assert full_slots.in_waves([3, 9, 5, 2], 2, 2) == 8 + 4
    assert full_slots.in_waves([3, 9, 5, 2], 2, 4) == 8


def test_a_number_below_one_gets_a_sentence():
    with pytest.raises(SystemExit, match="--slots: got 0; at least one is needed"):
        full_slots.main(["--slots", "0"])
