"""Decoding and our step on a card: graphs are captured, tokens are equal, and the card's own bytes are counted."""

import json

import pytest

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def record(on_the_card, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    on_the_card("bench/card_bench_process.py", str(model), str(folder), made=folder / "done")
    return json.loads((folder / "record.json").read_text())


def test_graphs_write_the_tokens_of_passes_without_them(record):
    graphs = record["parts"]["graphs"]
    assert graphs["status"] == "done" and graphs["values"]["note"] == ""
    for found in graphs["values"]["rows"].values():
        assert found["equal_completions"] == {"graphs": 1.0, "waves": 1.0}
        assert set(found["ratio"]) == {"without_graphs", "waves"} and found["tokens_per_second"]["graphs"] > 0


def test_our_step_counts_the_cards_bytes(record, card_device):
    step = record["parts"]["step"]
    assert (step["status"], step["reason"]) == ("failed", "trl: not tried here")
    peaks, before = step["values"]["ours"]["peak_bytes"], step["values"]["ours"]["bytes_before"]
    assert (
        peaks["step"] == max(peaks.values()) and min(peaks[one] for one in ("rollout", "score", "update")) >= before > 0
    )
    assert record["device"]["torch_device"] == card_device


def test_the_tests_of_the_card_are_left_out_where_torch_does_not_know_it(record, card_device):
    if card_device == "vcard:0":
        assert record["parts"]["device_tests"]["reason"] == "the device tests run on a card that torch knows by itself"


def test_the_plan_of_a_card_is_held_against_its_bytes(record):
    plan = record["parts"]["plan"]
    assert plan["status"] == "done", plan
    assert list(plan["values"]["memory"]) == ["rollout", "score", "update", "step"]
    assert 0.8 < plan["values"]["memory"]["step"]["ratio"] < 1.25  # small tensors, and each is rounded up to 512 bytes
    assert plan["values"]["reserved"]["measured"] >= plan["values"]["memory"]["step"]["measured"]
