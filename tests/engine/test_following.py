"""The reference that follows the policy: its dense weights against TRL's callback, and the cut to a bounded rank."""

import math

import pytest
import torch
from tiny_models import CPU, EOS, VOCAB, fill_adapter, tiny_model, tiny_tokenizer
from torch import nn
from trl.trainer.callbacks import SyncRefModelCallback

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.checksum import base_checksum
from lowmem_rlhf.engine.following import mix_into_reference, nearest
from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.recipe.lora_shape import LoraShape

IDS = torch.randint(EOS + 1, VOCAB, (14,), generator=torch.Generator().manual_seed(3)).tolist()
PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 6, "layers.1.mlp.*": 3}, "alpha_pattern": {"down_proj": 20}}
SHAPES = {
    "llama": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "patterns": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **PATTERNS}),
    "conv1d": ("gpt2", {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj"]}),
}


def base_of(model, shape, times, dtype=torch.float32):
    base = SharedBase(tiny_model(model).to(dtype), tiny_tokenizer(), "tiny", **shape)
    base.add_following(LoraShape.of(**shape), times)
    return base


@torch.no_grad()
def change(layer, role):
    """Return a role's change of a layer's weight (out, in), dense and exact."""
    a, b = layer.masters(role)
    return layer.scaling[role] * b.double() @ a.double()


def dense(base, role):
    """Return the weights that a role multiplies with, as a model of full parameters has them."""
    layers = base.adapter_layers()
    return nn.ParameterList([dense_weight(x.base_layer, torch.float32).double() + change(x, role) for x in layers])


def far(base, wanted):
    """Return the largest relative error of the reference's change beside any layer."""
    weights = [dense_weight(layer.base_layer, torch.float32).double() for layer in base.adapter_layers()]
    pairs = zip(base.adapter_layers(), wanted, weights, strict=True)
    return max(float((change(x, REFERENCE) - (w.data - base)).norm() / (w.data - base).norm()) for x, w, base in pairs)


def logits(base, role):
    with base.role(role):
        return base.head.logits(base.states(base.layout.lay_out([Group(IDS[:1], [IDS[1:]], [0])], CPU)))


@pytest.mark.parametrize("name", SHAPES)
def test_below_the_bound_the_reference_is_trls_on_dense_weights(name):
    base = base_of(*SHAPES[name], times=3)
    target = dense(base, REFERENCE)
    assert all(not change(layer, REFERENCE).any() for layer in base.adapter_layers())
    for mixed in range(3):
        fill_adapter(base, seed=mixed)
        assert mix_into_reference(base, 0.6, mixed) == 0
        SyncRefModelCallback._sync_target_model(dense(base, POLICY), target, 0.6)
        assert far(base, target) < 1e-6
    assert {layer.scaling[REFERENCE] for layer in base.adapter_layers()} == {1}
    ranks = [(len(x.masters(REFERENCE)[0]), len(x.masters(POLICY)[0])) for x in base.adapter_layers()]
    assert all(bound == 3 * r for bound, r in ranks) and len({r for _, r in ranks}) == (3 if name == "patterns" else 1)


@pytest.mark.parametrize("name", SHAPES)
def test_at_the_bound_the_reference_is_the_nearest_of_its_rank(name):
    base = base_of(*SHAPES[name], times=1)
    fill_adapter(base, seed=1)
    assert mix_into_reference(base, 0.6, 0) == 0
    for mixed in (1, 2):
        wanted, lost, whole = dense(base, REFERENCE), 0.0, 0.0
        fill_adapter(base, seed=mixed + 1)
        SyncRefModelCallback._sync_target_model(dense(base, POLICY), wanted, 0.6)
        for layer, weight in zip(base.adapter_layers(), wanted, strict=True):
            frozen, rank = dense_weight(layer.base_layer, torch.float32).double(), len(layer.masters(REFERENCE)[0])
            u, s, v = torch.linalg.svd(weight.detach() - frozen, full_matrices=False)
            weight.data = frozen + (u[:, :rank] * s[:rank]) @ v[:rank]
            lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
        assert mix_into_reference(base, 0.6, mixed) == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
        assert 0.1 < math.sqrt(lost / whole) < 0.9  # policies that have nothing in common
        assert far(base, wanted) < 5e-6
    a, b = next(base.adapter_layers()).masters(REFERENCE)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_a_policy_that_stays_is_kept_whole_at_any_rank():
    base = base_of(*SHAPES["llama"], times=1)
    fill_adapter(base)
    for mixed in range(40):
        assert mix_into_reference(base, 0.5, mixed) < 1e-6
    assert far(base, dense(base, POLICY)) < 1e-5  # rounding does not add up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_alpha_1_the_reference_is_the_policy(dtype):
    base = base_of(*SHAPES["patterns"], times=2, dtype=dtype)
    before = logits(base, REFERENCE)
    for mixed in (0, 1, 1):
        fill_adapter(base, seed=mixed)
        assert mix_into_reference(base, 1.0, mixed) == 0
    for layer in base.adapter_layers():
        (a, b), (a_ref, b_ref), rank = layer.masters(POLICY), layer.masters(REFERENCE), len(layer.masters(POLICY)[0])
        assert a_ref[:rank].equal(a) and b_ref[:, :rank].equal(b * layer.scaling[POLICY])
        assert not a_ref[rank:].any() and not b_ref[:, rank:].any()
    torch.testing.assert_close(logits(base, REFERENCE), logits(base, POLICY))
    assert (logits(base, REFERENCE) - before).abs().max() > 0.1


@pytest.mark.parametrize(("rank", "kept"), [(3, 3), (7, 6), (12, 6)])
def test_factors_of_more_columns_than_the_matrix_has(rank, kept):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((10, 6), generator=generator), torch.randn((8, 10), generator=generator)
    new_a, new_b, lost, whole = nearest(a, b, rank)
    assert (new_a.shape, new_b.shape) == ((kept, 6), (8, kept))
    s = torch.linalg.svdvals(b.double() @ a.double())
    assert float(lost) == pytest.approx(float(s[kept:].square().sum()), rel=1e-5, abs=1e-6)
    assert float(whole) == pytest.approx(float(s.square().sum()), rel=1e-5)
    assert float((new_b @ new_a - b @ a).norm()) == pytest.approx(math.sqrt(float(lost)), rel=1e-4, abs=1e-5)


def test_it_neither_trains_nor_counts_as_the_frozen_base():
    base = base_of(*SHAPES["llama"], times=2)
    following, checksum = base.following(), base_checksum(base)
    assert not following.keys() & base.trainable().keys()
    assert {p.dtype for p in following.values()} == {torch.float32}
    assert sum(p.numel() for p in following.values()) == 2 * sum(p.numel() for p in base.trainable().values())
    fill_adapter(base)
    mix_into_reference(base, 0.6, 0)
    assert base_checksum(base) == checksum
    next(base.adapter_layers()).base_layer.weight.data[0, 0] += 1
    assert base_checksum(base) != checksum
    base.remove_role(REFERENCE)
    assert not base.follows and not base.following()
