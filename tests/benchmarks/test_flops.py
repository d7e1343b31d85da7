"""The floor's FLOP and byte formulas, against torch's own count of our passes and against tensors that are there."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from flops import Flops, Layout, Tokens, backward, decode_bytes, forward, parts, recomputed
from tiny_models import as_batch, ragged_groups, tiny_base, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from lowmem_rlhf.algorithms.grpo import update
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.planning.memory.rollout import kv_bytes_per_token
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling

RANK = 4  # of tiny_base
SHAPES = [(7, [6, 6, 6]), (5, [6, 6, 6])]
TOKENS = Tokens([7, 5], [6] * 6)
RECTANGLES = 7 * 7 + 5 * 5 + 3 * 5 * (7 + 5) + 3 * 5 * (5 + 5)  # what attention computes: it masks half of a square
WHOLE = BatchLimits(1.0, 10_000, 64)
OBJECTIVE = update.Objective.of(GRPOSettings(beta=0.0), 6)
FAMILIES = ("llama", "llama-tied-biased", "qwen3", "gemma2", "phi", "gpt2")


class OneModule:
    """Stands for the counter's module tracker, which cannot follow modules called inside autograd functions."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def counted(work) -> Counter:
    """Return torch's FLOPs of ``work``: products of matrices, and of batches of them (attention)."""
    in_place = {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which the counter does not know
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    counter.mod_tracker = OneModule()
    with counter:
        work()
    found: Counter = Counter()
    for operator, flops in counter.get_flop_counts()["Global"].items():
        found["attention" if "bmm" in str(operator) else "products"] += flops
    return found


def products(flops: Flops) -> int:
    return flops.total - flops.attention


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    base, _ = tiny_base(request.param)
    dims = dimensions_from_config(base.model.config.to_dict(), request.param)
    batch = as_batch(ragged_groups(shapes=SHAPES))
    return base, dims, replace(batch, advantages=[1.0] * len(batch.completions))


def test_a_pass_without_gradients_takes_the_flops_of_the_formula(case):
    base, dims, batch = case
    with base.role("reference"):
        found = counted(lambda: completion_logprobs(base, batch.groups(range(6)), WHOLE))
    expected = forward(dims, 0, TOKENS.packed, RECTANGLES, TOKENS.scored)
    assert found == {"products": products(expected), "attention": expected.attention}
    assert forward(dims, 0, TOKENS.packed, TOKENS.pairs, TOKENS.scored).attention < expected.attention


@pytest.mark.parametrize("checkpointing", [False, True, 1])
def test_forward_and_backward_take_the_flops_of_the_formula(case, checkpointing):
    base, dims, batch = case
    base.set_gradient_checkpointing(checkpointing)
    with base.role("policy"):
        found = counted(lambda: update.backward(base, batch, OBJECTIVE, WHOLE, {}))
    sizes = (dims, RANK, TOKENS.packed, RECTANGLES, TOKENS.scored)
    expected = forward(*sizes) + recomputed(*sizes[:-1], checkpointing) + backward(*sizes)
    assert found == {"products": products(expected), "attention": expected.attention}


def test_a_rollout_takes_the_flops_of_prefill_and_decoding(case, monkeypatch):
    base, dims, batch = case
    monkeypatch.setattr(type(base), "stop_ids", frozenset())
    with base.role("policy"):
        found = counted(
            lambda: wave_engine(base).generate(batch.prompts, 3, 6, Sampling(), RolloutLimits(6, 100, 64), 0)
        )
    needed = {p.name: p.flops for p in parts(dims, TOKENS, Layout("none", 4, RANK, False), 6, 100, False)}
    expected = needed["prefill"] + needed["decode"]
    assert found["products"] == products(expected)
    assert expected.attention <= found["attention"] <= 1.5 * expected.attention


def test_causal_pairs_are_those_of_the_masks():
    rows = torch.ones(7, 7).tril().sum() + torch.ones(5, 5).tril().sum()
    own = torch.cat([torch.ones(5, 12).tril(7), torch.ones(5, 12).tril(7), torch.ones(5, 12).tril(7)]).sum()
    own += 3 * torch.ones(5, 10).tril(5).sum()
    assert (TOKENS.prompt_pairs, TOKENS.decode_pairs) == (int(rows), int(own))
    assert (TOKENS.packed, TOKENS.scored) == (12 + 6 * 5, 36)


def test_weight_and_cache_bytes_are_those_of_the_tensors(case):
    base, dims, _ = case
    layout = Layout("none", 4, RANK, False)
    linears = [layer.base_layer.weight for layer in base.adapter_layers()]
    assert layout.weights(dims) == sum(w.nbytes for w in linears)
    assert layout.head(dims) == base.head.module.weight.nbytes
    assert layout.adapters(dims) == sum(p.nbytes for p in base.trainable().values())


def test_cache_bytes_are_those_of_transformers_cache():
    model = tiny_model("llama")
    dims = dimensions_from_config(model.config.to_dict(), "tiny")
    cache = DynamicCache(config=model.config)
    model(torch.arange(4, 15)[None], past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 11 * kv_bytes_per_token(dims, 4)


def test_decoding_reads_weights_once_a_pass_and_a_prompt_once_for_all_its_completions():
    dims = dimensions_from_config(tiny_model("llama").config.to_dict(), "tiny")
    layout, cache = Layout("none", 4, RANK, False), kv_bytes_per_token(dims, 4)
    weights = layout.rollout(dims)
    # one pass: the prompt's 7 keys, each completion's first token, and that token written
    assert decode_bytes(dims, Tokens([7], [2, 2, 2]), 3, layout) == weights + (7 + 3 * 1 + 3) * cache
    # the first completion ends after its first token: no pass has to read it
    assert decode_bytes(dims, Tokens([7], [1, 2, 2]), 3, layout) == weights + (7 + 2 * 1 + 2) * cache
    # three waves of one completion: the weights and the prompt are read for each
    assert decode_bytes(dims, Tokens([7], [2, 2, 2]), 1, layout) == 3 * (weights + (7 + 1 + 1) * cache)
    # two passes: what was written in the first is read in the second
    assert decode_bytes(dims, Tokens([7, 4], [3, 3]), 2, layout) == 2 * weights + (11 + 2 + 2 + 11 + 4 + 2) * cache
    assert decode_bytes(dims, Tokens([7], [1, 1]), 2, layout) == 0


def test_a_rollout_copy_of_nf4_weights_is_made_once_and_read_in_every_pass():
    dims = dimensions_from_config(tiny_model("llama").config.to_dict(), "tiny")
    quantized, copied = Layout("nf4", 2, RANK, False), Layout("nf4", 2, RANK, True)
    dense = 2 * dims.linear_parameters
    assert copied.rollout(dims) - quantized.rollout(dims) == dense - quantized.weights(dims)
    by_name = {p.name: p.memory for p in parts(dims, TOKENS, copied, 6, 100, True)}
    assert by_name["copy"] == quantized.weights(dims) + dense
    assert {p.name: p.memory for p in parts(dims, TOKENS, quantized, 6, 100, True)}["copy"] == 0
