"""No pass without gradients makes a later gradient wrong: bitsandbytes would reorder 4-bit codes in evaluation mode."""

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from tiny_models import CPU, fill_adapter, ragged_groups, save_tiny
from tiny_runs import tiny_recipe
from transformers import AutoModelForCausalLM

from lowmem_rlhf.algorithms.trl.model import RoleModel
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.load import load_base, quantization_settings
from lowmem_rlhf.engine.logprobs import tiled_logprobs
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.export.proof.outputs import role_logits
from lowmem_rlhf.inference.chat.talk import ChatOptions, Talk
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling

IDS = torch.tensor([[5, 9, 60, 7, 8, 30], [5, 9, 61, 7, 20, 4]])


def evaluation(base):
    for dequantize in (False, True):
        with torch.no_grad(), base.role(POLICY), base.decoding(dequantize):
            wave_engine(base).generate([[5, 6, 7], [8]], 2, 6, Sampling(1.0), RolloutLimits(4, 4096, 64), seed=1)


def chat(base):
    talk = Talk(base, tiny_recipe("no-model"), ChatOptions(compare=True, max_tokens=4))
    for reply in talk.ask("3+4="):
        assert list(reply.pieces())


@torch.no_grad()
def export(base):
    for role in (POLICY, REFERENCE):
        role_logits(base, role, IDS.tolist())


@torch.no_grad()
def trl_evaluation(base):
    for role in (POLICY, REFERENCE):
        model = RoleModel(base, role, 16)
        model.eval()
        model(IDS, labels=IDS.masked_fill(torch.arange(6) < 2, -100), fused_lm_head=True)
        assert model(IDS).logits.isfinite().all()


@torch.no_grad()
def evaluation_mode(base):
    """What a library may do to a model that it is given: stock transformers' own forward, in its evaluation mode."""
    base.model.eval()
    with base.role(REFERENCE):
        base.states(base.layout.lay_out(ragged_groups(), base.device))
    base.model.train()


def gradients(base):
    for p in base.trainable().values():
        p.grad = None
    batch = base.layout.lay_out(ragged_groups(), base.device)
    with base.role(POLICY):
        states = base.states(batch).index_select(0, batch.predict)
        logps, _ = tiled_logprobs(states, batch.targets, base.head, 1.0, 16)
        (-logps.mean()).backward()
    return {name: p.grad.clone() for name, p in base.trainable().items()}


@pytest.fixture(scope="module", params=["llama", "lfm2", "gpt_oss"])
def folder(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_after_every_other_use_of_a_base_are_those_before(folder, quantization):
    base = SharedBase.load(str(folder), CPU, quantization, "bfloat16", r=4, lora_alpha=8)
    fill_adapter(base, size=0.05)
    before = gradients(base)
    assert any(gradient.any() for gradient in before.values())
    for use in (evaluation, chat, export, trl_evaluation, evaluation_mode):
        use(base)
        after = gradients(base)
        assert all(torch.equal(gradient, after[name]) for name, gradient in before.items()), use.__name__
    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    assert bool(layers) == (quantization == "nf4")
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


def input_gradient(model):
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    (model(inputs_embeds=embedded).logits.float().square().mean()).backward()
    return embedded.grad.float().flatten()


def off(model):
    """Return how far the gradient is turned by a pass in evaluation mode."""
    before = input_gradient(model.train())
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    return 1 - float(torch.cosine_similarity(before, input_gradient(model.train()), dim=0))


def test_a_stock_model_as_it_is_loaded_here_keeps_its_gradient(tiny_folder):
    model, _ = load_base(str(tiny_folder), "nf4", "bfloat16", CPU)
    assert off(model) < 1e-6


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes reorders nothing on this processor")
def test_a_stock_model_of_transformers_does_not(tiny_folder):
    """If this fails, bitsandbytes was mended, and `_keep_order` can go."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.bfloat16, quantization_config=quantization_settings("nf4", torch.bfloat16)
    )
    assert off(model) > 0.3
