"""The adapter that a server gets is the policy: in stock peft, and as a GGUF."""

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from tiny_runs import save_tiny_model, tiny_recipe
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_standin import base_of

from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.rollout.server.adapter import PlainAdapter, plain_adapter, save_plain
from lowmem_rlhf.rollout.server.check import logps_of
from lowmem_rlhf.rollout.server.gguf_adapter import save_gguf_adapter

TEXT = [5, 6, 7, 8, 9, 4, 10, 11]


@pytest.fixture
def base(tmp_path):
    """A base whose adapter has ranks and scales of several kinds, and does something."""
    lora = {"r": 4, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}}
    base = base_of(tiny_recipe(save_tiny_model(tmp_path / "model"), lora=lora))
    with torch.no_grad():
        for layer in base.adapter_layers():
            for one in layer.masters(POLICY):
                one.normal_(std=0.3, generator=torch.Generator().manual_seed(one.shape[0]))
    base.adapters_changed()
    return base


def stock_logps(model):
    logits = model(torch.tensor([TEXT])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(TEXT[1:])[:, None])[:, 0].tolist()


def test_the_plain_adapter_is_the_policy_in_stock_peft(base, tmp_path):
    with base.role(POLICY):
        ours = logps_of(base, TEXT[:1], TEXT[1:])
        adapter = plain_adapter(base)
    save_plain(adapter, tmp_path / "adapter", "m")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    alone = stock_logps(stock)
    assert stock_logps(PeftModel.from_pretrained(stock, tmp_path / "adapter")) == pytest.approx(ours, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(alone, ours, strict=True)) > 0.1
    with base.role(REFERENCE):
        assert plain_adapter(base) is None


def test_two_active_adapters_are_one_of_both_ranks(base):
    base.add_role("more", 3, 6.0, "all-linear", below=POLICY)
    with torch.no_grad():
        for layer in base.adapter_layers():
            layer.masters("more")[1].normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    base.adapters_changed()
    with base.role("more"):
        both = plain_adapter(base)
    for layer, one in zip(base.adapter_layers(), both.layers.values(), strict=True):
        products = [b @ a * layer.scaling[name] for name in (POLICY, "more") for a, b in [layer.masters(name)]]
        torch.testing.assert_close(one[1] @ one[0], sum(products).detach())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_gguf_adapter_is_what_llama_cpp_reads(model_type, tmp_path):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = AutoConfig.for_model(model_type, **shape)
    names = {
        "q_proj": (64, "attn_q"),
        "k_proj": (32, "attn_k"),
        "v_proj": (32, "attn_v"),
        "o_proj": (64, "attn_output"),
    }
    layers = {
        f"base_model.model.model.layers.1.self_attn.{name}": (torch.randn(3, 64), torch.randn(outs, 3))
        for name, (outs, _) in names.items()
    }
    save_gguf_adapter(PlainAdapter(layers), tmp_path / "a.gguf", config)
    reader = GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == model_type and fields["adapter.lora.alpha"] == 0.0
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(found) == 8
    for (layer, (a, b)), (_, called) in zip(layers.items(), names.values(), strict=True):
        heads = {"attn_q": 4, "attn_k": 2}.get(called) if model_type == "llama" else None
        if heads:  # rows i and i + D/2 of a head of D rows lie side by side, as convert_lora_to_gguf.py has it
            d = b.shape[0] // heads
            order = [h * d + i + half * d // 2 for h in range(heads) for i in range(d // 2) for half in (0, 1)]
            b = b[order]
        assert torch.equal(found[f"blk.1.{called}.weight.lora_a"], a), layer
        assert torch.equal(found[f"blk.1.{called}.weight.lora_b"], b), layer


@pytest.mark.parametrize(
    ("model_type", "layer", "said"),
    [
        ("bert", "encoder.layer.0.attention.self.query", "is not for a base of type bert"),
        ("llama", "model.layers.0.other_proj", r"takes no adapter beside model\.layers\.0\.other_proj\.weight"),
    ],
)
def test_an_adapter_that_llama_cpp_has_no_place_for_is_refused(model_type, layer, said, tmp_path):
    adapter = PlainAdapter({f"base_model.model.{layer}": (torch.zeros(2, 8), torch.zeros(8, 2))})
    with pytest.raises(UserError, match=rf"generation\.engine: llama_cpp {said}"):
        save_gguf_adapter(adapter, tmp_path / "a.gguf", AutoConfig.for_model(model_type))
    assert not (tmp_path / "a.gguf").exists()
