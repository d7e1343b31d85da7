"""Weights in the form that decodes fastest: the same numbers, for a rollout alone."""

import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
from bitsandbytes import functional
from tiny_models import CPU, fill_adapter, save_tiny

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.decode import products as decoding
from lowmem_rlhf.engine.decode.native import NativeProduct, library
from lowmem_rlhf.engine.decode.products import KERNEL_ROWS, four_bit_layout
from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.packing import Group, pack
from lowmem_rlhf.engine.passes import packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.planning.limits import FOUR_BIT_ROWS
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling

FORMS = [
    "16-bit copy",
    pytest.param(
        "bitsandbytes' kernel",
        marks=pytest.mark.skipif(not functional.has_avx512bf16(), reason="this CPU has no AVX512-bf16"),
    ),
    pytest.param(
        "our product",
        marks=pytest.mark.skipif(library() is None, reason="no AVX512-bf16 here, or no C compiler"),
    ),
]
HALF = torch.finfo(torch.bfloat16).eps / 2  # the largest relative error of one rounding


def load(folder, quantization="nf4", dtype="bfloat16"):
    base = SharedBase.load(str(folder), CPU, quantization, dtype, r=4, lora_alpha=8)
    fill_adapter(base, size=0.05)
    return base


@pytest.fixture(scope="module", params=["llama", "llama-tied-biased"])
def base(request, tmp_path_factory):
    return load(save_tiny(request.param, tmp_path_factory.mktemp("model") / request.param))


@contextmanager
def decode_weights(base, form):
    """Be decoding with weights of this form."""
    with pytest.MonkeyPatch.context() as patch:
        if form == "bitsandbytes' kernel":
            patch.setattr(decoding, "library", lambda: None)
        with base.decoding(form == "16-bit copy"):
            found = {isinstance(group.decode_product, NativeProduct) for group in base.grouped_layers}
            assert found == {form == "our product"}
            yield


def held_bytes():
    """Return the bytes of all storages that Python can reach."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def outputs(group, x):
    with torch.no_grad():
        return torch.cat([layer(x) for layer in group.layers], dim=-1)


def distance(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 192)])
@pytest.mark.parametrize("nested", [False, True])
def test_layout_is_the_one_of_bitsandbytes(shape, nested):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=64)
    got = four_bit_layout(codes, shape)
    want, _ = functional._convert_weight_packed_for_cpu(codes, state)  # changes the state
    assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 5, KERNEL_ROWS])
@pytest.mark.parametrize("role", [POLICY, "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_a_lent_product_is_that_of_the_dequantized_weights_to_rounding(base, form, role, rows):
    generator = torch.Generator().manual_seed(rows)
    for group in base.grouped_layers:
        first = group.layers[0]
        x = torch.randn((rows, first.in_features), generator=generator).bfloat16()
        exact = []
        for layer in group.layers:
            y = x.double() @ dense_weight(layer.base_layer, torch.bfloat16).double().t()
            if layer.base_layer.bias is not None:
                assert layer.base_layer.bias.any()
                y += layer.base_layer.bias.double()
            if role == POLICY:
                a, b = layer.masters(POLICY)
                y += layer.scaling[POLICY] * (x.double() @ a.double().t() @ b.double().t())
            exact.append(y)
        with base.role(role), decode_weights(base, form):
            assert group.decode_product is not None
            got = outputs(group, x)
        assert got.dtype == torch.bfloat16
        # roundings of the scale of a block (4-bit kernel), of A and B, of x A^T, of the base's output and of the sum
        assert distance(got, torch.cat(exact, dim=-1)) < 3 * HALF


@pytest.mark.parametrize("form", FORMS[1:])
def test_more_rows_than_a_four_bit_product_likes_take_the_plain_layers(base, form):
    group = base.grouped_layers[0]
    x = torch.randn(FOUR_BIT_ROWS + 1, group.layers[0].in_features).bfloat16()
    with base.role(POLICY):
        want = outputs(group, x)
        with decode_weights(base, form):
            assert torch.equal(outputs(group, x), want)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_lent_is_given_back(base, form):
    x = torch.randn(3, base.grouped_layers[0].layers[0].in_features).bfloat16()
    with base.role(POLICY):
        want = outputs(base.grouped_layers[0], x)  # makes the adapters' copies
    before = held_bytes()
    numbers = sum(layer.out_features * layer.in_features for layer in base.adapter_layers())
    with base.role(POLICY), decode_weights(base, form):
        assert all(group.decode_product is not None for group in base.grouped_layers)
    with pytest.raises(ZeroDivisionError), base.role(POLICY), decode_weights(base, form):
        outputs(base.grouped_layers[0], x)
        raise ZeroDivisionError
    assert all(group.decode_product is None for group in base.grouped_layers)
    after = held_bytes()
    assert after <= before  # less by the adapters' copies, which are made anew
    assert before - after < numbers / 2
    with base.role(POLICY):
        assert torch.equal(outputs(base.grouped_layers[0], x), want)


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "bfloat16"), ("nf4", "float32")])
def test_where_nothing_is_gained_nothing_changes(tiny_folder, quantization, dtype):
    base = load(tiny_folder, quantization, dtype)
    with base.decoding(False):
        assert all(group.decode_product is None for group in base.grouped_layers)


def test_where_bitsandbytes_has_no_such_kernel_its_layers_stay(base, monkeypatch):
    monkeypatch.setattr(decoding, "KERNEL", "a_function_of_another_release")
    monkeypatch.setattr(decoding, "library", lambda: None)
    with base.decoding(False):
        assert all(group.decode_product is None for group in base.grouped_layers)


@pytest.mark.parametrize("form", [*FORMS, None])
def test_joined_results_are_the_results_side_by_side(base, form):
    x = torch.randn(5, base.grouped_layers[0].layers[0].in_features).bfloat16()
    group = base.grouped_layers[0]
    for role in (POLICY, "reference"):
        with torch.no_grad(), base.role(role), nullcontext() if form is None else decode_weights(base, form):
            assert (group.decode_product is None) == (form is None)
            assert torch.equal(group.concatenated(x), torch.cat(list(group.results(x)), dim=-1))


@pytest.mark.parametrize("form", FORMS)
def test_sampling_logps_are_those_of_the_training_pass(base, form):
    prompts = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
    with base.role(POLICY):
        with decode_weights(base, form):
            rollout = wave_engine(base).generate(prompts, 8, 24, Sampling(), RolloutLimits(16, 64, 16), seed=2)
        groups, row = [], 0
        for prompt, completions in zip(prompts, rollout, strict=True):
            groups.append(Group(prompt, [c.ids for c in completions], range(row, row + len(completions))))
            row += len(completions)
        with torch.no_grad():
            logps, _ = packed_logprobs(base, pack(groups, CPU), 1.0, 16, entropy="none")
    sampled = torch.tensor([logp for completions in rollout for c in completions for logp in c.logps])
    lengths = [len(c.ids) for completions in rollout for c in completions]
    assert len(sampled) == sum(lengths) > 100
    by_length = pack(groups, CPU).row_index.bincount().tolist()
    assert by_length == lengths
    assert float((logps - sampled).abs().mean()) < 0.02
    assert float((logps - sampled).mean()) == pytest.approx(0, abs=0.01)
