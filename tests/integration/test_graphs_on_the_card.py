"""Decoding by graphs on a card: captured passes are the uncaptured ones, and waves' to rounding, for every family.

The script fails where anything that is captured waits for the device: it then says so in ``note``.
"""

import json
from typing import Any

import pytest

PACKED = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gemma4", "gpt2", "qwen3_5", "lfm2", "granite"}
PACKED |= {"granite_hybrid"}
IN_NF4 = {f"{family}, nf4" for family in ("llama", "gemma3", "qwen3_5")}
CLOSE = 1e-5


@pytest.fixture(scope="module")
def results(on_the_card, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("graphs")
    on_the_card("integration/card_graphs_process.py", str(folder), made=folder / "graphs.json")
    return json.loads((folder / "graphs.json").read_text())


@pytest.fixture(scope="module")
def sampled(results) -> dict[str, Any]:
    return {name: found for name, found in results.items() if name not in ("micro-batches", "broken")}


def test_every_pass_is_captured(sampled):
    assert sampled.keys() >= PACKED | IN_NF4
    assert {name: found["note"] for name, found in sampled.items() if found["note"]} == {}


def test_captured_passes_are_the_uncaptured_ones_bit_for_bit(sampled):
    assert [name for name, found in sampled.items() if not found["uncaptured"]["bits"]] == []


def test_completions_are_those_of_waves(sampled):
    for name, found in sampled.items():
        assert found["waves"]["tokens"] and found["waves"]["logps"] < CLOSE, name
        assert found["lengths"][0] < found["lengths"][-1], name  # rows end at different times


def test_refilled_slots_write_the_same_completions(sampled):
    for name, found in sampled.items():
        assert found["refilled"]["tokens"] and found["refilled"]["logps"] < CLOSE, name


def test_the_host_waits_once_in_eight_tokens(sampled):
    for name, found in sampled.items():
        # the last look of a rollout may come after fewer passes
        assert found["waits"] <= -(-found["passes"] // 8) + 1 and found["passes"] > 16, (name, found)
    waits, passes = (sum(found[key] for found in sampled.values()) for key in ("waits", "passes"))
    assert waits <= passes / 7


def test_graphs_that_are_kept_read_what_an_optimizer_step_has_changed(sampled):
    every = {name: found["kept"] for name, found in sampled.items() if "kept" in found}
    assert every.keys() >= {"llama", "gpt2", "gemma4", "qwen3_5", "llama, nf4"}
    for name, kept in every.items():
        assert kept["graphs"] >= 1 and kept["same graphs"] and kept["changed"], name
        assert kept["fresh"]["bits"], name


def test_models_of_llama_s_shape_take_the_fast_decoder(sampled):
    fast = {name for name in PACKED | IN_NF4 if sampled[name]["fast"]}
    assert fast >= {"llama", "qwen2", "qwen3", "mistral", "llama, nf4"}


def test_a_graph_that_computes_something_else_is_not_taken(results):
    found = results["broken"]
    assert found["note"].endswith("captured as a graph: a replayed pass does not compute what the pass itself does")
    assert found["waves"]["tokens"] and found["waves"]["logps"] < CLOSE


def test_no_micro_batch_waits_for_the_device(results):
    """What is measured of it is read once, however many there are: in fp32, and the counts."""
    assert results["micro-batches"] == {"score": [0, 0], "update": [2, 2], "mini-batch": [2, 2]}
