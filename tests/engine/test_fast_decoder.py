"""The decoder without its modules: the same states as stock modules, or not taken."""

import pytest
import torch
from tiny_models import COMMON, CPU, ragged_groups, tiny_base, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_rlhf.engine.attention import PackedContext
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.decode.trial import try_fast_decoder
from lowmem_rlhf.engine.packing import pack
from lowmem_rlhf.engine.roles import POLICY


def states(run, packed):
    return run(packed.input_ids, packed.position_ids, PackedContext(packed.buckets, CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_it_computes_what_the_stock_decoder_computes(family, dtype):
    base, _ = tiny_base(family, dtype=dtype)
    packed = pack(ragged_groups(), CPU)
    assert base.fast_decoder is not None
    for role in (POLICY, "reference"):
        with base.role(role), torch.no_grad():
            want, got = states(base.hidden_states, packed), states(base.fast_decoder.hidden_states, packed)
        near = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        assert float((got - want).float().norm() / want.float().norm()) < near


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "phi", "cohere", "olmo2"])
def test_other_shapes_keep_their_modules(family):
    base, _ = tiny_base(family)
    assert base.fast_decoder is None
    packed = pack(ragged_groups(), CPU)
    with base.role(POLICY), torch.no_grad():
        assert torch.equal(states(base.next_hidden_states, packed), states(base.hidden_states, packed))


def test_a_model_of_that_shape_which_computes_something_else_keeps_its_modules():
    base, _ = tiny_base("granite")  # Llama's parts, with factors on embeddings, residuals and attention
    assert base.fast_decoder is None


def test_the_trial_sees_a_difference():
    base, _ = tiny_base("llama")
    layer = base.decoder.layers[1]
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.001, *args[1:]))
    assert try_fast_decoder(base) is None


def test_a_scale_of_queries_beyond_some_position_keeps_the_modules():
    """Ministral 3 scales queries beyond its original positions; the trial's texts are short."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
    config = AutoConfig.for_model(
        "ministral3", **COMMON, head_dim=16, rope_parameters={**rope, "llama_4_scaling_beta": 0.3}
    )
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    assert SharedBase(stock, tiny_tokenizer(), "tiny", r=4, lora_alpha=8).fast_decoder is None
