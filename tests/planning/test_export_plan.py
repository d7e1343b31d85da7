"""What an export takes by the planner's arithmetic, against what is written and what a merge holds."""

import pytest

from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.planning.memory.export import export_disk_bytes, export_memory_bytes, merge_memory_bytes

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def dims():
    return dimensions_from_config(LLAMA_8B, "an 8B")


def test_disk_is_all_parameters_and_a_gguf_lies_beside_them(dims):
    assert export_disk_bytes(dims) == pytest.approx(2 * 8.03e9, rel=5e-3)
    assert export_disk_bytes(dims, "float32") == pytest.approx(4 * 8.03e9, rel=5e-3)
    beside = export_disk_bytes(dims, "float16", "q8_0") - export_disk_bytes(dims)
    assert beside == pytest.approx(8.5 / 8 * 8.03e9, rel=5e-3)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_merge_takes_the_largest_tensor_and_a_few_hundred_mb_at_most(dims, quantization):
    largest = 2 * dims.vocab_size * dims.hidden_size
    assert merge_memory_bytes(dims, quantization, "bfloat16") < largest + 300e6
    layers = dimensions_from_config(LLAMA_8B | {"num_hidden_layers": 320}, "an 80B")
    assert merge_memory_bytes(layers, quantization, "bfloat16") == merge_memory_bytes(dims, quantization, "bfloat16")


def test_the_parts_follow_from_the_precisions(dims):
    parts = export_memory_bytes(dims, "nf4", "float16")
    assert parts["live_policy"] < 10e9 < 16e9 < parts["loaded_again"] < 17e9
    assert parts["live_policy"] < parts["stock_policy"] < parts["live_policy"] + 300e6  # some more logits
    original = export_memory_bytes(dims, "nf4", "float16", onto="original", kind="q8_0")
    assert parts["merge"] > original["merge"]
    assert "original_policy" not in parts and "gguf_loaded_again" not in parts
    assert original["original_policy"] == original["gguf_loaded_again"] > 2 * 16e9
