"""Mixtures of experts: NF4 experts against their dense numbers, and a run that leaves as what it computed with."""

import json

import pytest
import torch
from architecture_measures import CPU
from architecture_runs import COMMON, RUNS, command
from tiny_architectures import save_tiny, tiny
from transformers import AutoModelForCausalLM

from lowmem_rlhf.architecture.experts import expert_stacks, names_beside_experts
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.experts import ExpertStack
from lowmem_rlhf.engine.packing import Group

# experts one by one in the files, stacked in them, transposed with biases, one by one under other names
FAMILIES = ["qwen3_moe", "granitemoehybrid+experts", "gpt_oss", "mixtral"]
GROUP = [Group([7, 33, 120, 8, 9, 61], [[200, 31, 5, 77], [6, 90]], [0, 1])]


def logits(base):
    with torch.no_grad(), base.role("reference"):
        return base.head.logits(base.states(base.layout.lay_out(GROUP, CPU)))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_nf4_are_their_dense_numbers(family, tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    save_tiny(family, tmp_path, hidden_size=64)
    base = SharedBase.load(str(tmp_path), CPU, "nf4", "float32", r=4, lora_alpha=8)
    stacks = expert_stacks(base.model)
    assert stacks and all(getattr(module, name).quant_state is not None for module, name in stacks)
    codes = sum(getattr(module, name).data.numel() for module, name in stacks)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    assert 2 * codes == sum(getattr(module, name).numel() for module, name in expert_stacks(dense))
    with torch.no_grad():
        for (module, name), (target, _) in zip(stacks, expert_stacks(dense), strict=True):
            stack = ExpertStack(getattr(module, name))
            getattr(target, name).copy_(torch.stack([stack.dense(e, CPU) for e in range(len(getattr(target, name)))]))
        quantized = dict(base.model.named_modules())
        for name, linear in dense.named_modules():
            layer = quantized.get(f"{name}.base_layer", quantized.get(name))
            if state := getattr(getattr(layer, "weight", None), "quant_state", None):
                linear.weight.copy_(dequantize_4bit(layer.weight.data, state))
    exact = SharedBase(dense.requires_grad_(False), base.tokenizer, "dense", r=4, lora_alpha=8)
    assert torch.allclose(logits(base), logits(exact), atol=1e-4)


@pytest.mark.parametrize("family", ["recurrent_gemma", "zamba", "llama4_text", "lfm2"])
def test_other_parameters_of_three_dimensions_are_no_experts(family):
    model = tiny(family)
    assert not expert_stacks(model) and names_beside_experts(model) is None


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_gradient_flows_through_experts_in_nf4(family, tmp_path):
    save_tiny(family, tmp_path, hidden_size=64)
    base = SharedBase.load(str(tmp_path), CPU, "nf4", "float32", r=4, lora_alpha=8)
    stack = ExpertStack(getattr(*expert_stacks(base.model)[0]))
    weight = stack.dense(1, CPU)
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.nn.functional.linear(x, stack[1]).square().sum().backward()
    found, x.grad = x.grad.clone(), None
    torch.nn.functional.linear(x, weight).square().sum().backward()
    assert torch.equal(found, x.grad)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoehybrid+experts", "mixtral"])
def test_a_run_on_nf4_experts_leaves_as_the_numbers_it_computed_with(family, tmp_path):
    save_tiny(family, tmp_path / "model", hidden_size=64)
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(json.dumps({"name": "tiny", "model": str(tmp_path / "model"), **COMMON, **RUNS["grpo"]}))
    code, _, error = command("train", recipe, "--output", tmp_path / "run")
    assert code == 0, error
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sampling/logp_difference"] < 0.1 for row in rows)
    code, out, error = command("export", tmp_path / "run", "--dtype", "float32", "--json")
    assert code == 0, error
    proof = json.loads(out)["proof"]
    assert json.loads(out)["onto"] == "quantized" and proof["mean_kl"] < 1e-5


def test_a_run_with_a_critic_has_the_adapters_of_the_policy_twice(tmp_path):
    save_tiny("qwen3_moe", tmp_path, hidden_size=64)
    base = SharedBase.load(str(tmp_path), CPU, "nf4", "float32", r=4, lora_alpha=8)
    base.add_role("critic", 4, 8.0, "all-linear")
    layers = {
        role: {name.split(".lora_A")[0] for name, _ in base.peft.named_parameters() if f".lora_A.{role}." in name}
        for role in ("policy", "critic")
    }
    assert layers["policy"] == layers["critic"] and len(layers["policy"]) == 2 * 4  # q, k, v and o of two layers
