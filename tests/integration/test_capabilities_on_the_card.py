"""What is said of a card's kind (`hardware.capabilities`), held against the card itself."""

import json

import pytest
import torch


@pytest.fixture(scope="module")
def facts(on_the_card, tmp_path_factory):
    file = tmp_path_factory.mktemp("capabilities") / "facts.json"
    on_the_card("integration/card_capabilities_process.py", str(file), made=file)
    return json.loads(file.read_text())


def test_a_card_is_known_by_its_kind_alone(facts, card_device):
    assert facts["kind"] == card_device.partition(":")[0]
    assert facts["of_the_device"] == facts["of_torchs_device"]
    assert not facts["of_the_device"]["on_cpu"] and facts["reached"]


def test_what_is_said_of_a_card_is_so(facts):
    said = facts["of_the_device"]
    assert said["counts_memory"] == facts["has_counter"] and (facts["counted"] or not facts["has_counter"])
    assert said["pinned_copies"] == facts["pinned"] and facts["equal"]
    assert facts["captures"] or not said["graphs"]


def test_a_card_computes_in_a_dtype_that_it_has(facts, card_device):
    assert facts["half_dtype"] == ("bfloat16" if facts["bf16"] else "float16")
    assert facts["product"] < 0.01
    if card_device.startswith("cuda") and torch.version.hip is None:
        assert facts["bf16"] == (torch.cuda.get_device_capability() >= (8, 0))
