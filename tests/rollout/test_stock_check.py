"""The check at load: exact models pass in every precision, wrong ones do not, and the base is as it was."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import (
    CPU,
    FAMILIES,
    RECURRENT,
    UNPACKABLE,
    fill_adapter,
    ragged_groups,
    sampled_difference,
    save_tiny,
    tiny_base,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_rlhf.architecture import families
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.engine.stock import stock_forwards
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.rollout import stock_check
from lowmem_rlhf.rollout.stock_check import TESTED_WITH, Distance, StockCheck, check, checked, is_tested
from lowmem_rlhf.training.sampling_check import STOP, expected_difference

pytestmark = pytest.mark.long

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
PRECISIONS = [("none", "float16"), ("nf4", "bfloat16"), ("int8", "float16")]  # beside float32 and bfloat16
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT, *UNPACKABLE])
def test_exact_families_pass_and_are_not_stopped(family, dtype):
    base, _ = tiny_base(family, dtype=dtype, adapter=0)
    found = check(base)
    assert found.exact
    assert found.way == ("padded" if family in UNPACKABLE else "packed")
    if dtype == torch.float32:
        assert max(found.trained.largest, found.decoded.largest) < 5e-5
    fill_adapter(base, size=0.05)
    assert sampled_difference(base) < STOP / 2 * expected_difference("none", str(dtype).removeprefix("torch."), 1.0)


@pytest.mark.parametrize(("quantization", "dtype"), PRECISIONS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if families.family_of(FAMILIES[family][0]).tested])
def test_no_exact_family_is_refused_or_stopped_in_any_precision(family, quantization, dtype, tmp_path):
    base = SharedBase.load(str(save_tiny(family, tmp_path / "model")), CPU, quantization, dtype, r=4, lora_alpha=8)
    assert checked(base).exact and base.packable
    fill_adapter(base, size=0.05)
    assert sampled_difference(base) < STOP / 2 * expected_difference(quantization, dtype, 1.0)


def test_the_adapter_is_what_it_was():
    base, _ = tiny_base("llama", adapter=0)
    before = {name: p.clone() for name, p in base.trainable().items()}
    check(base)
    assert all(torch.equal(p, before[name]) for name, p in base.trainable().items())
    fill_adapter(base)
    filled = {name: p.clone() for name, p in base.trainable().items()}
    assert check(base).exact
    assert all(torch.equal(p, filled[name]) for name, p in base.trainable().items())


def test_the_base_runs_as_before_after_the_stock_forwards():
    base, _ = tiny_base("gemma3", dtype=torch.bfloat16)
    batch = base.layout.lay_out(ragged_groups(), CPU)
    with torch.no_grad(), base.role(POLICY):
        before = base.states(batch)
        with stock_forwards(base):
            pass
        assert torch.equal(base.states(batch), before)


def test_it_takes_texts_where_there_is_a_tokenizer(tmp_path):
    base = SharedBase.load(str(save_tiny("llama", tmp_path / "m")), CPU, "none", "float32", r=4, lora_alpha=8)
    groups = stock_check._groups(base)
    text = base.tokenizer.decode(groups[0].prompt)
    assert stock_check.PROMPTS[0].startswith(text) and len({len(c) for g in groups for c in g.completions}) > 1
    assert checked(base).exact


def test_what_is_packed_and_wrong_is_padded_and_right(monkeypatch):
    base, _ = tiny_base("llama", adapter=0)
    packed = base.hidden_states
    monkeypatch.setattr(base, "hidden_states", lambda *given: packed(*given) * 1.01)
    found = checked(base)
    assert found.exact and found.way == "padded" and not base.packable and base.fast_decoder is None
    assert "cannot be packed" in base.note


def test_a_wrong_model_is_refused_by_a_sentence_with_the_difference(monkeypatch):
    base, _ = tiny_base("bloom", adapter=0)
    right = base.stock_states
    monkeypatch.setattr(base, "stock_states", lambda *given: right(*given).roll(1, -1))
    with pytest.raises(
        UserError, match=r"is refused: here its log-probs, as trained on, differ .* nats a token"
    ) as told:
        checked(base)
    assert float(re.search(r"by ([\d.e+-]+) nats", str(told.value))[1]) > 0.1


def test_what_is_not_finite_is_not_exact(monkeypatch):
    base, _ = tiny_base("bloom", adapter=0)
    right = base.stock_states
    monkeypatch.setattr(base, "stock_states", lambda *given: right(*given) * float("nan"))
    assert not check(base).exact


def test_the_list_of_tested_types_is_that_of_the_tests_and_holds_for_the_pinned_release(monkeypatch):
    tested = {model_type for model_type, family in families.FAMILIES.items() if family.tested}
    assert {model_type for model_type, _ in FAMILIES.values()} == tested
    pinned = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert pinned == TESTED_WITH
    llama, olmo3 = tiny_model("llama"), AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo3", **SMALL))
    assert is_tested(llama) == (transformers.__version__ == TESTED_WITH) and not is_tested(olmo3)
    of_its_own = type("LlamaForCausalLM", (type(llama),), {"__module__": "transformers_modules.somebodys"})
    assert not is_tested(of_its_own(llama.config))
    monkeypatch.setattr(stock_check, "TESTED_WITH", "5.0.0")  # as with another release than the pinned one
    assert not is_tested(llama)


def test_distances():
    off = Distance.between(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([-1.0, -2.5, -2.0]))
    assert off == Distance(mean=pytest.approx(2.5 / 3), median=0.5, upper=0.5, largest=2.0)


@pytest.mark.parametrize("experts", [True, False])
def test_of_a_mixture_in_16_bits_a_few_tokens_may_differ_and_no_third_of_them(experts):
    noise, right = Distance(0.01, 0.01, 0.02, 0.05), torch.zeros(20)
    found = {"way": "packed", "tokens": 20, "noise": noise, "slack": 1e-3, "factor": 1.0, "experts": experts}
    for tokens, allowed in ((2, experts), (7, False)):
        wrong = right.clone()
        wrong[:tokens] = 3.0
        distance = Distance.between(wrong, right)
        assert StockCheck(trained=distance, decoded=distance, **found).exact == allowed


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 24}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    ],
)
def test_the_length_at_which_rotary_factors_change_is_known(family, changes):
    base = SharedBase(tiny_model(family, **changes), tiny_tokenizer(), "x", r=4, lora_alpha=8)
    assert base.rotary_limit == (24 if family == "phi3" else 128)
    assert tiny_base("llama")[0].rotary_limit is None


def test_its_peak_memory_is_within_the_plan_of_the_smallest_run(smollm2):
    small = {"hardware.device": "cpu", "generation.num_generations": 2, "training.prompts_per_step": 1}
    recipe = load_recipe("quickstart", [f"{key}={value}" for key, value in small.items()])
    plan = plan_recipe(recipe)
    settings, before = plan.settings, LiveBytes().current  # of earlier tests in this process
    base = SharedBase.load(
        smollm2, CPU, settings.quantization, settings.compute_dtype, r=settings.lora["r"], lora_alpha=32
    )
    with LiveBytes() as live:
        assert check(base).exact
    assert live.peak - before < plan.memory["low_bytes"]
