"""Decoding in C: products as exact as their rounding, the same states as torch's operations, and what it is not for."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import CPU, fill_adapter, save_tiny

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.decode import fast_decoder, native
from lowmem_rlhf.engine.decode.native import FEW_ROWS, NativeDecoder, NativeProduct, few_rows, library
from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.logprobs import Head
from lowmem_rlhf.engine.lora import SharedLoraLinear
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.planning.limits import FOUR_BIT_ROWS
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.shared_prompt import prefill

pytestmark = pytest.mark.skipif(library() is None, reason="no AVX512-bf16 here, or no C compiler")
HALF = torch.finfo(torch.bfloat16).eps / 2  # the largest relative error of one rounding
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36]]
EACH, STEPS, LEAVE = 3, 40, 11  # completions a prompt, tokens (more than a block of the cache), when rows leave
STAY = [1, 2, 4, 5, 6]
FAMILIES = ("llama", "llama-tied-biased", "qwen2")


def load(family, folder, quantization="nf4", dtype="bfloat16", **changes):
    path = save_tiny(family, folder / family, **changes)
    base = SharedBase.load(str(path), CPU, quantization, dtype, r=4, lora_alpha=8)
    fill_adapter(base, size=0.05)
    return base


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("model"))


def exact_twin(base):
    """Return a base with the very numbers that this one's weights stand for, in fp32."""
    twin = SharedBase.load(base.model_id, CPU, "none", "float32", r=4, lora_alpha=8)
    fill_adapter(twin, size=0.05)
    with torch.no_grad():
        for ours, theirs in zip(base.model.modules(), twin.model.modules(), strict=True):
            if isinstance(ours, SharedLoraLinear):
                theirs.base_layer.weight.copy_(dense_weight(ours.base_layer, torch.bfloat16))
                if ours.base_layer.bias is not None:
                    theirs.base_layer.bias.copy_(ours.base_layer.bias)
            elif type(ours).__name__.endswith(("Embedding", "RMSNorm")) and hasattr(ours, "weight"):
                theirs.weight.copy_(ours.weight)
        twin.head.module.weight.copy_(base.head.module.weight)
    return twin


@torch.no_grad()
def walk(base):
    """Return the hidden states of every row and token while completions of ragged prompts are written."""
    rows = [b for b in range(len(PROMPTS)) for _ in range(EACH)]
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(4, 97, (STEPS, len(rows)), generator=generator)
    state, hidden = prefill(base, PROMPTS, rows, STEPS, 64)
    found = [hidden.float()]
    for step in range(STEPS):
        if step == LEAVE:
            state.keep(STAY)
        fed = tokens[step] if step < LEAVE else tokens[step][STAY]
        found.append(state.next_states(base, fed).float())
    return found


def off(found, exact):
    """Return the distance to the exact states over their norm, of all steps together."""
    got, want = (torch.cat([x.flatten() for x in states]) for states in (found, exact))
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("role", [POLICY, REFERENCE])
def test_states_are_as_close_to_the_exact_ones_as_torchs(base, role, monkeypatch):
    with base.role(role), base.decoding(False):
        natively = walk(base)
        assert base.fast_decoder._natively is True, "C was not taken"
        monkeypatch.setattr(fast_decoder, "native_decoder", lambda *given: None)
        base.fast_decoder.forget()
        by_torch = walk(base)
    twin = exact_twin(base)
    with twin.role(role):
        exact = walk(twin)
    assert [x.shape for x in natively] == [x.shape for x in exact]
    assert all(not torch.equal(a, b) for a, b in zip(natively[1:], by_torch[1:], strict=True)), "the same path twice"
    assert off(natively, exact) < 1.1 * off(by_torch, exact) < 0.03
    for step in (1, LEAVE, LEAVE + 1, STEPS):  # no step is off on its own
        assert off(natively[step : step + 1], exact[step : step + 1]) < 0.03


def test_both_roles_differ(base):
    with base.decoding(False):
        states = []
        for role in (POLICY, REFERENCE, POLICY):
            with base.role(role):
                states.append(walk(base))
    assert off(states[0], states[1]) > 0.05
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


def test_the_first_rollout_of_a_process_is_that_of_any_other(tmp_path):
    """The first token tries out whether C computes the same; a resumed run must not notice."""
    base = load("llama", tmp_path)
    with base.role(POLICY), base.decoding(False):
        first, second = walk(base), walk(base)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changed_adapters_are_taken(base):
    with base.role(POLICY), base.decoding(False):
        before = walk(base)
        fill_adapter(base, seed=5, size=0.05)
        assert off(walk(base), before) > 0.01
    fill_adapter(base, size=0.05)


def test_completions_do_not_depend_on_how_many_are_written_at_once(base):
    with base.role(POLICY), base.decoding(False):
        found = [
            wave_engine(base).generate(PROMPTS, 5, 24, Sampling(), RolloutLimits(rows, 64, 16), seed=3)
            for rows in (15, 5, 2)
        ]  # all of the output head's rows are few
    assert found[0] == found[1] == found[2]
    assert base.fast_decoder._natively is True


@pytest.mark.parametrize("rows", [1, 3, 4, 17, FOUR_BIT_ROWS])
def test_a_product_is_rounded_once_and_reads_bitsandbytes_numbers(base, rows):
    generator = torch.Generator().manual_seed(rows)
    for group in base.grouped_layers:
        bases = [layer.base_layer for layer in group.layers]
        weight = torch.cat([dense_weight(one, torch.bfloat16) for one in bases])
        bias = torch.randn(weight.shape[0], generator=generator).bfloat16()
        x = torch.randn((rows, weight.shape[1]), generator=generator).bfloat16()
        exact = x.double() @ weight.double().t() + bias.double()
        got = NativeProduct(bases, bias)(x)
        assert got.dtype == torch.bfloat16
        assert float((got.double() - exact).abs().max() / exact.abs().max()) < 1.01 * HALF
        ones = torch.eye(weight.shape[1], dtype=torch.bfloat16)[:rows]
        assert torch.equal(NativeProduct(bases, None)(ones), weight[:, :rows].t())


@pytest.mark.parametrize(("out", "width"), [(97, 64), (1, 32), (1000, 576)])
@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS])
def test_a_16_bit_product_of_few_rows_is_rounded_once(out, width, rows):
    generator = torch.Generator().manual_seed(out)
    layer = torch.nn.Linear(width, out, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.randn((out, width), generator=generator))
        x = torch.randn((width, rows), generator=generator).bfloat16().t()  # not contiguous
        exact = x.double() @ layer.weight.double().t()
        got = few_rows(x, layer)
        assert float((got.double() - exact).abs().max() / exact.abs().max()) < 1.01 * HALF
        assert torch.equal(Head(layer).logits(x), got)


def test_torch_multiplies_what_the_product_is_not_for():
    layer = torch.nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
    x = torch.zeros((FEW_ROWS + 1, 64), dtype=torch.bfloat16)
    with torch.no_grad():
        assert few_rows(x[:1], layer) is not None
        assert few_rows(x, layer) is None
        assert few_rows(x[:1].float(), layer.float()) is None
        assert few_rows(x[:1, :48], torch.nn.Linear(48, 8, bias=False, dtype=torch.bfloat16)) is None
        assert few_rows(x[:1], torch.nn.Linear(64, 8, dtype=torch.bfloat16)) is None
    assert few_rows(x[:1], torch.nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)) is None  # a gradient is wanted


def test_what_is_not_finite_stays_so(base):
    weight = base.decoder.layers[0].input_layernorm.weight
    kept = weight.detach().clone()
    try:
        with base.role(POLICY), base.decoding(False), torch.no_grad():
            walk(base)  # the trial is over
            weight.fill_(float("nan"))
            rows = [0, 1, 2]
            state, _ = prefill(base, PROMPTS, rows, 2, 64)
            assert not torch.isfinite(state.next_states(base, torch.tensor(rows))).any()
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def all_a_little(x, kept):
    x.mul_(1.05)


def one_element(x, kept):
    x[-1, 7] += 0.5 * x[-1].abs().max()  # the last row: a trial that looks at one number for all rows sees the first


def one_stored_key(x, kept):
    kept.layers[1][2][1, 3, kept.length - 1] += 1.0


@pytest.mark.parametrize("fault", [all_a_little, one_element, one_stored_key])
def test_a_decoder_that_computes_something_else_is_not_taken(fault, tmp_path, monkeypatch):
    base = load("llama", tmp_path)
    original = NativeDecoder.run

    def wrong(self, x, cos, sin, kept, only=None):
        original(self, x, cos, sin, kept, only)
        fault(x, kept)

    monkeypatch.setattr(NativeDecoder, "run", wrong)
    with base.role(POLICY), base.decoding(False):
        got = walk(base)
        assert base.fast_decoder._natively is False
        monkeypatch.setattr(fast_decoder, "native_decoder", lambda *given: None)
        assert all(torch.equal(a, b) for a, b in zip(got, walk(base), strict=True))


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma"])  # norms of heads, a window, another RMSNorm
def test_layers_of_another_kind_stay_torchs(family, tmp_path):
    base = load(family, tmp_path)
    with base.role(POLICY), base.decoding(False):
        assert all(isinstance(group.decode_product, NativeProduct) for group in base.grouped_layers)
        walk(base)
    assert base.fast_decoder is not None and base.fast_decoder._natively is None


def test_without_a_compiler_or_switched_off_there_is_no_library(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    path = os.environ["PATH"]
    cases = {
        "found": (path, "1", True),
        "off": (path, "0", False),
        "none": (str(tmp_path / "nothing"), "1", False),
        "broken": (str(tmp_path), "1", False),
    }
    for found, switch, there in cases.values():
        monkeypatch.setenv("PATH", found)
        monkeypatch.setenv("LOWMEM_RLHF_NATIVE", switch)
        native.library.cache_clear()
        assert (native.library() is not None) == there
    monkeypatch.undo()
    native.library.cache_clear()


def test_it_is_compiled_once_and_without_a_warning(monkeypatch, tmp_path):
    compiler = native.cpu_device().compiler
    strict = [compiler, *native.FLAGS, "-Wall", "-Wextra", "-Werror", str(native.SOURCE), "-o", str(tmp_path / "a.so")]
    assert subprocess.run(strict, capture_output=True, text=True).stderr == ""
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    made = native._compiled(compiler)
    assert made.parent == tmp_path / "cache" / "native" and [made] == list(made.parent.iterdir())
    when = made.stat().st_mtime_ns
    assert native._compiled(compiler) == made and made.stat().st_mtime_ns == when
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    assert native._compiled(compiler) != made and len(list(Path(made.parent).iterdir())) == 2
