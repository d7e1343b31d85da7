"""Memory that runs out on a card is survived with the undisturbed adapter, or ends a run whole and with a sentence.

A sample of each kind of fault; `make faults` tries every line of the package that allocates, and results/ has what
came of it.
"""

import json
from pathlib import Path

import pytest

ALIKE = 1e-5  # the largest difference of an adapter's entry
SAMPLE = {"grpo": ["sites=2", "shortages=5"], "ppo": ["sites=3", "random=2"]}


@pytest.fixture(scope="module", params=SAMPLE)
def faults(request, on_the_card, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return one row for each fault of a case."""
    folder = tmp_path_factory.mktemp("faults")
    made = folder / f"{request.param}.json"
    on_the_card(
        "faults/memory_process.py", str(tiny_model), str(folder), request.param, *SAMPLE[request.param], made=made
    )
    return json.loads(made.read_text())["faults"]


def test_an_allocation_that_fails_once_is_survived_with_the_undisturbed_adapter(faults):
    for row in faults:
        if row["site"] != "shortage":
            assert row["code"] == 0, row
            assert row["distance"] <= ALIKE, row


def test_a_shortage_is_survived_with_less_or_ends_the_run_with_what_it_lacks(faults):
    rows = [row for row in faults if row["site"] == "shortage"]
    for row in rows:
        assert row["distance"] <= ALIKE, row  # also of the run that was resumed where this one ended
        if row["code"]:
            assert (row["code"], row["resumed"]) == (1, 0), row
            assert row["noticed"][0].endswith("phase; trying once more")
            assert "going on with" in row["noticed"][1]
            sentence = row["said"].strip().splitlines()[-1]
            for part in ("ran out in the", "phase even with hardware.", "are predicted for it and", "step 1 is kept"):
                assert part in sentence, row
    if rows:
        assert {row["code"] for row in rows} == {0, 1}
