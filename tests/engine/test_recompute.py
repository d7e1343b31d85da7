"""Recomputing all layers, some or none gives the same gradients, and the peak falls with every layer more."""

from itertools import pairwise

import pytest
import torch
from tiny_models import CPU, ragged_groups, tiny_base

from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.engine.packing import pack
from lowmem_rlhf.engine.passes import packed_logprobs
from lowmem_rlhf.engine.recompute import recompute_layers
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.planning.memory.layers import Layer
from lowmem_rlhf.planning.shapes import packed_shape

pytestmark = pytest.mark.long

LAYERS = 4


def gradients_of(base):
    """Return every adapter parameter's gradient of one packed pass."""
    packed = pack(ragged_groups(), CPU)
    base.zero_grad(set_to_none=True)
    with base.role(POLICY):
        logps, _ = packed_logprobs(base, packed, 1.0, 8)
        logps.sum().backward()
    return {name: p.grad.clone() for name, p in base.trainable().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gpt2"])
def test_gradients_are_the_same_numbers_however_many_layers_are_recomputed(family, dtype):
    size = {"n_layer": LAYERS} if family == "gpt2" else {"num_hidden_layers": LAYERS}
    base, _ = tiny_base(family, dtype=dtype, **size)
    kept = gradients_of(base)
    assert all(g.any() for g in kept.values())
    for layers in (0, 1, LAYERS - 1, LAYERS, True, False):
        for offload in (False, True):
            base.set_gradient_checkpointing(layers, offload)
            got = gradients_of(base)
            assert all(torch.equal(got[name], kept[name]) for name in kept), (layers, offload)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gradients_are_the_same_with_layers_of_two_kinds(family):
    base, _ = tiny_base(family)
    kept = gradients_of(base)
    for layers in (1, 2):
        base.set_gradient_checkpointing(layers)
        got = gradients_of(base)
        assert all(torch.equal(got[name], kept[name]) for name in kept), layers


def test_the_first_layers_are_recomputed():
    base, _ = tiny_base("llama", num_hidden_layers=LAYERS)
    for layers, expected in ((2, [True, True, False, False]), (True, [True] * 4), (1, [True] + [False] * 3), (0, [])):
        base.set_gradient_checkpointing(layers)
        found = [layer.gradient_checkpointing for layer in base.decoder.layers]
        assert found == (expected or [False] * LAYERS)


def test_more_layers_than_there_are_are_refused():
    base, _ = tiny_base("llama", num_hidden_layers=LAYERS)
    for layers in (LAYERS + 1, -1):
        with pytest.raises(UserError, match=f"got {layers}, but the model has 4 layers"):
            recompute_layers(base.model, layers, offload=False)


def peaks_of(base, counts):
    """Return the peak of live bytes of a pass, on top of what was there before it, by number of recomputed layers."""
    packed = pack(ragged_groups(shapes=[(40, [60, 60, 60])]), CPU)
    counter, peaks = LiveBytes(), []
    for count in counts:
        base.set_gradient_checkpointing(count)
        base.zero_grad(set_to_none=True)
        before = counter.current
        counter.reset_peak()
        with counter, base.role(POLICY):
            logps, _ = packed_logprobs(base, packed, 1.0, 64)
            logps.sum().backward()
        del logps
        peaks.append(counter.peak - before)
    return peaks, packed.input_ids.numel()


def test_the_peak_falls_with_every_layer_that_is_recomputed():
    layers = 6
    base, _ = tiny_base("llama", num_hidden_layers=layers, hidden_size=64, intermediate_size=256, vocab_size=256)
    peaks_of(base, [0])  # makes the 16-bit copies and what else stays
    peaks, tokens = peaks_of(base, range(layers + 1))
    assert peaks == sorted(peaks, reverse=True)
    dims = dimensions_from_config(base.model.config.to_dict(), "tiny")
    shape = packed_shape(prompt=40, fed=59, scored=60, generations=3, groups=1, tokens=tokens)
    layer = Layer(dims, shape, 4, (4,) * len(dims.linears), 1, dense=0, explicit_scores=True, wide=False)
    for more, fewer in pairwise(peaks[:layers]):
        assert more - fewer == pytest.approx(layer.saved() - layer.hidden, rel=0.1)
    assert peaks[-1] < 0.4 * peaks[0]
