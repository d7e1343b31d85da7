"""NF4 weights of layers with one input in one tensor: the same numbers, in the same memory, multiplied at once."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import save_tiny, tiny_base

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.decode.products import _joined_product, join_codes
from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.engine.load import load_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("qwen2", tmp_path_factory.mktemp("qwen2"))


def load(folder, quantization: str = "nf4", join: bool = True) -> SharedBase:
    return SharedBase.load(str(folder), CPU, quantization, "float32", join=join, r=4)


def dense(base: SharedBase) -> dict[str, torch.Tensor]:
    layers = {name: m for name, m in base.model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "group")}
    return {name: dense_weight(layer.base_layer, torch.float32).clone() for name, layer in layers.items()}


def test_joined_weights_are_the_same_bits_and_no_second_copy(folder):
    alone, _ = load_base(str(folder), "nf4", "float32", CPU)
    apart, joined = load(folder, join=False), load(folder)
    want, got = dense(apart), dense(joined)
    assert len(want) == 14 and all(torch.equal(got[name], want[name]) for name in want)

    def stored(model) -> int:
        linear = [p for n, p in model.named_parameters() if p.dtype == torch.uint8]
        return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in linear}.values())

    assert stored(joined.model) == stored(apart.model) == stored(alone) > 0
    joined_groups = [group for group in joined.grouped_layers if len(group.layers) > 1]
    assert [len(group.layers) for group in joined_groups] == [3, 2] * 2
    for group in joined_groups:
        assert len({one.base_layer.weight.untyped_storage().data_ptr() for one in group.layers}) == 1
    names = [[n for n, _ in base.peft.named_parameters()] for base in (apart, joined)]
    assert names[0] == names[1]


def test_their_product_is_that_of_the_dense_weights_with_biases(folder):
    base = load(folder)
    for group in base.grouped_layers:
        bases = [layer.base_layer for layer in group.layers]
        product = _joined_product(bases, torch.float32)
        if len(bases) == 1:
            assert product is None
            continue
        x = torch.randn(5, bases[0].in_features, generator=torch.Generator().manual_seed(0))
        weight = torch.cat([dense_weight(one, torch.float32) for one in bases])
        bias = torch.cat([one.bias for one in bases]) if bases[0].bias is not None else None
        assert torch.allclose(product(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_weights_that_lie_apart_or_are_not_in_nf4_are_not_multiplied_at_once(folder):
    assert all(
        _joined_product([one.base_layer for one in g.layers], torch.float32) is None
        for g in load(folder, join=False).grouped_layers
    )
    wide, _ = tiny_base("llama")
    before = [p.data_ptr() for p in wide.model.parameters()]
    for group in wide.grouped_layers:
        join_codes(group)
        assert _joined_product([one.base_layer for one in group.layers], torch.float32) is None
    assert before == [p.data_ptr() for p in wide.model.parameters()]
