"""Layers with one input as one product: which form a group, and the sums of LoRA's formula layer by layer."""

import pytest
import torch
from tiny_models import fill_adapter, tiny_base

from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.engine.lora import lora_config
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.recipe.lora_shape import LoraShape

TOGETHER = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}],
    "phi3": [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
}
CLOSE = 1e-6
SECOND = "second"


def names_of(base, group):
    """Return the ends of the layers' names, as many parts as `TOGETHER` gives."""
    names = {module: name for name, module in base.model.named_modules()}
    parts = 2 if "gpt2" in type(base.model).__name__.lower() else 1
    return {".".join(names[layer].split(".")[-parts:]) for layer in group.layers}


@pytest.mark.parametrize("family", TOGETHER)
def test_layers_that_are_called_with_one_input_form_a_group(family):
    base, _ = tiny_base(family)
    assert [names_of(base, group) for group in base.grouped_layers] == 2 * TOGETHER[family]  # two transformer layers
    found = [layer for group in base.grouped_layers for layer in group.layers]
    assert len(found) == len(set(found)) and set(found) == set(base.adapter_layers())
    assert all(layer.group is group for group in base.grouped_layers for layer in group.layers)


def distance(got, want):
    """Return |got - want| / |want|, in double precision."""
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def formula(layers, adapters, x):
    """Return outputs and the leaves x and, by (layer, adapter), A and B of LoRA's formula in double precision."""
    x = x.detach().double().requires_grad_()
    leaves, outputs = {}, []
    for number, layer in enumerate(layers):
        y = x @ dense_weight(layer.base_layer, torch.float64).double().t()
        if layer.base_layer.bias is not None:
            y = y + layer.base_layer.bias.double()
        for name in adapters:
            a, b = (master.detach().double().requires_grad_() for master in layer.masters(name))
            leaves[number, name] = (a, b)
            y = y + layer.scaling[name] * (x @ a.t() @ b.t())
        outputs.append(y)
    return outputs, x, leaves


def check(base, group, adapters, order, frozen=()):
    """Call the layers of a group in this order (others stay uncalled), compare all with the formula.

    Masters of ``frozen`` adapters must get no gradient.
    """
    layers = group.layers
    generator = torch.Generator().manual_seed(len(order))
    x = torch.randn((2, 5, layers[0].in_features), generator=generator).requires_grad_()
    want, exact_x, leaves = formula(layers, adapters, x)
    outer = [torch.randn(y.shape, generator=generator) for y in want]
    base.zero_grad(set_to_none=True)
    base.active.names = tuple(adapters)
    try:
        got = {number: layers[number](x) for number in order}
    finally:
        base.active.names = ()
    sum((got[number] * outer[number]).sum() for number in order).backward()
    sum((want[number] * outer[number].double()).sum() for number in order).backward()
    for number in order:
        assert distance(got[number], want[number]) < CLOSE
    assert distance(x.grad, exact_x.grad) < CLOSE
    for (number, name), pair in leaves.items():
        for master, exact in zip(layers[number].masters(name), pair, strict=True):
            if name in frozen or number not in order:
                assert master.grad is None or not master.grad.any()
            else:
                assert distance(master.grad, exact.grad) < CLOSE


@pytest.mark.parametrize("family", ["llama", "llama-tied-biased", "gpt2", "phi3"])
@pytest.mark.parametrize("adapters", [(POLICY,), ()], ids=["policy", "reference"])
def test_outputs_and_gradients_are_the_formulas_layer_by_layer(family, adapters):
    base, _ = tiny_base(family)
    for group in base.grouped_layers:
        check(base, group, adapters, range(len(group.layers)))


@pytest.mark.parametrize("order", [(2, 0, 1), (1,), (0, 2), (2, 1)], ids=str)
def test_another_order_and_an_output_that_nobody_fetches(order):
    base, _ = tiny_base("llama")
    group = base.grouped_layers[0]
    assert len(group.layers) == 3
    check(base, group, (POLICY,), order)
    check(base, group, (POLICY,), range(3))  # what nobody fetched does not come back later


def test_grouped_layers_that_get_different_inputs_after_all():
    base, _ = tiny_base("llama")
    layers = base.grouped_layers[0].layers
    inputs = [torch.randn(4, layers[0].in_features) for _ in layers]
    with base.role(POLICY), torch.no_grad():
        for _ in range(2):
            got = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
            again = layers[0](inputs[0])
    for number, x in enumerate(inputs):
        assert distance(got[number], formula(layers, (POLICY,), x)[0][number].detach()) < CLOSE
    assert torch.equal(again, got[0])


def test_an_equal_input_that_is_another_tensor_is_computed_anew():
    base, _ = tiny_base("llama")
    q, k, _ = base.grouped_layers[0].layers
    x = torch.randn(4, q.in_features)
    changed = x.clone()
    with base.role(POLICY), torch.no_grad():
        q(x)
        changed.mul_(2)
        assert distance(k(changed), formula([k], (POLICY,), changed)[0][0].detach()) < CLOSE


@pytest.mark.parametrize("frozen", [(), (POLICY,), (SECOND,)], ids=str)
def test_two_adapters_at_once(frozen):
    base, _ = tiny_base("llama-tied-biased")
    base.peft.add_adapter(SECOND, lora_config(LoraShape(3, 12), "tiny", base.model))
    for layer in base.adapter_layers():
        for name in (POLICY, SECOND):
            for master in layer.masters(name):
                master.requires_grad_(True)
    fill_adapter(base, seed=7)
    for layer in base.adapter_layers():
        for name in frozen:
            for master in layer.masters(name):
                master.requires_grad_(False)
    for group in base.grouped_layers:
        check(base, group, (POLICY, SECOND), range(len(group.layers)), frozen)
        check(base, group, (SECOND,), range(len(group.layers)), frozen)


def test_what_waits_is_for_the_role_and_the_gradient_mode_that_asked():
    base, _ = tiny_base("llama")
    q, k, _ = base.grouped_layers[0].layers
    x = torch.randn((1, 5, q.in_features), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with base.role(POLICY):
            adapted = k(x)
        plain = k(x)
        assert distance(adapted, plain) > 0.01
        with base.role(POLICY):
            q(x)  # k waits for this role
        assert torch.equal(k(x), plain)
        with base.role(POLICY):
            q(x)
    with base.role(POLICY):
        assert k(x).requires_grad
        q(x)
        for master in k.masters(POLICY):
            master.data.mul_(2)
        base.adapters_changed()
        assert distance(k(x), adapted) > 0.01
