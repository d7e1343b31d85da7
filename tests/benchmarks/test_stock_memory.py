"""The stock step on sizes against closed forms, and what it refuses. Beside the real stack: test_stock_twin.py."""

from dataclasses import replace

import pytest
from stock_memory.allocator import MIB
from stock_memory.stock import predict
from stock_memory.stock_run import StockRun

from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.errors import RunError, UserError

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
BASE = StockRun(dimensions_from_config(QWEN, "qwen"), 1, 1024, r=32)


def test_the_logits_hump_in_closed_form():
    """At the peak of the loss four float32 copies of the logits are alive; in 16 bits one of them has half the size."""
    tokens, vocabulary, hidden = 1024, 151936, 1536
    for quantization, copies in (("nf4", 4.0), ("none", 3.5)):
        parts = predict(replace(BASE, quantization=quantization)).parts
        last_norm = 4 * tokens * hidden if quantization == "none" else 0  # its float32 input; else a hidden state
        assert parts["logits"] == pytest.approx(4 * copies * tokens * vocabulary + last_norm, rel=0.005)


def test_the_resident_part_in_closed_form():
    memory = predict(BASE)
    dimensions = BASE.dimensions
    adapters = 4 * dimensions.lora_parameters(32, ["q_proj", "k_proj", "v_proj", "o_proj"])
    plain = 4 * (dimensions.num_parameters - dimensions.linear_parameters)
    assert memory.parts["adapters"] == adapters
    assert memory.parts["optimizer"] == 2 * adapters
    assert memory.parts["weights"] == pytest.approx(dimensions.linear_parameters * (1 / 2 + 4 / 64) + plain, rel=0.02)
    assert memory.load == memory.parts["weights"] + adapters
    checkpoints = 4 * 1024 * 1536 * (28 + 1)  # float32, one a layer, and the last one's result for the norm
    assert memory.parts["hidden states"] == pytest.approx(checkpoints, rel=0.05)
    assert sum(memory.parts.values()) == memory.allocated <= memory.reserved


def test_the_scores_hump_in_closed_form():
    """Eager attention on the way back: result, gradient, result of the gradient and scratch, and the mask besides."""
    scores = 12 * 4096**2
    small = dimensions_from_config({**QWEN, "vocab_size": 1000, "intermediate_size": 1536}, "small")
    run = replace(BASE, dimensions=small, sequence_length=4096, attention="eager")
    hump = predict(run).parts["layer"]
    per_token = 4096 * 4 * (6 * 1536 + 4 * 1536 + 8 * 256)  # an upper bound on all else that a layer keeps
    assert 16 * scores <= hump <= 16 * scores + per_token
    half = predict(replace(run, quantization="none")).parts["layer"]
    assert 14 * scores <= half <= 14 * scores + per_token  # the gradient is cast to float16


def test_eight_bit_states_are_a_quarter_and_paged_ones_are_elsewhere():
    full, eight, paged = (
        predict(replace(BASE, optimizer=name)).parts.get("optimizer", 0)
        for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    )
    assert 0.25 * full < eight < 0.3 * full
    assert paged == 0


def test_more_is_more():
    base = predict(BASE).allocated
    assert predict(replace(BASE, gradient_checkpointing=False)).allocated > base + 28 * 50 * MIB
    assert predict(replace(BASE, targets=("all-linear",))).load > predict(BASE).load
    assert predict(replace(BASE, double_quantization=True)).load < predict(BASE).load
    assert predict(replace(BASE, quantization="int8")).load > predict(BASE).load
    assert predict(replace(BASE, batch_size=2)).allocated > base


def test_a_prediction_is_the_same_every_time():
    assert predict(BASE) == predict(BASE)


def test_a_card_that_is_too_small():
    memory = predict(BASE)
    assert predict(BASE, capacity=memory.reserved).allocated == memory.allocated
    with pytest.raises(RunError, match="out of memory"):
        predict(BASE, capacity=memory.allocated - 512 * MIB)


def test_what_is_not_known_is_refused():
    with pytest.raises(UserError, match="optimizer: got 'lion'"):
        predict(replace(BASE, optimizer="lion"))
    with pytest.raises(UserError, match="targets: got query; the linear layers are q_proj, k_proj"):
        predict(replace(BASE, targets=("query",)))
