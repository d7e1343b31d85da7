"""The plan: the contract, the rule, pins, and what it says when something does not fit."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from planning_cases import CONFIGS, GIB, card, cpu

from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.advice import why_not
from lowmem_rlhf.planning.memory.phases import phases
from lowmem_rlhf.planning.plan import SHARING, Settings, make_plan
from lowmem_rlhf.planning.shapes import group_tokens, row_tokens

PRECISION = {"nf4": 0, "int8": 1, "none": 2}


def test_the_contract(recipe):
    plan = make_plan(recipe("Qwen2.5-0.5B"), card(10.75), "rtx-2080-ti-11gb").to_dict()
    keys = {"fits", "verdict", "peak_bytes_range", "device", "profile", "settings", "reasons", "memory", "time"}
    assert set(plan) == keys
    assert set(plan["memory"]) == {"budget_bytes", "peak_bytes", "low_bytes", "high_bytes", "phases", "host"}
    assert set(plan["memory"]["phases"]) == {"rollout", "scoring", "update", "optimizer", "export"}
    assert list(plan["settings"]) == [field.name for field in fields(Settings) if field.name not in SHARING]
    assert set(plan["reasons"]) == set(plan["settings"])
    assert all(reason for reason in plan["reasons"].values())
    assert plan["memory"]["peak_bytes"] == max(sum(phase.values()) for phase in plan["memory"]["phases"].values())
    assert plan["profile"] == "rtx-2080-ti-11gb"
    assert json.loads(json.dumps(plan))["settings"] == plan["settings"]


def test_the_reference_card_takes_gsm8k_in_float16(recipe):
    loaded = recipe("Qwen2.5-0.5B")
    plan = make_plan(loaded, card(10.75), "rtx-2080-ti-11gb")
    assert plan.fits and why_not(plan, loaded) == ""
    assert plan.settings.compute_dtype == "float16"
    assert plan.settings.quantization == "none"
    assert plan.settings.rollout_batch_size == 64
    assert row_tokens(loaded) <= plan.settings.micro_batch_tokens
    assert "no bfloat16" in plan.reasons["compute_dtype"]


def test_a_7b_fits_on_the_reference_card_in_nf4(recipe):
    plan = make_plan(recipe("Qwen2.5-7B"), card(10.75), "x")
    assert plan.fits and plan.settings.quantization == "nf4" and plan.settings.gradient_checkpointing


def test_a_7b_does_not_fit_on_4_gb_and_says_why(recipe):
    loaded = recipe("Qwen2.5-7B")
    plan = make_plan(loaded, card(3.75, bf16=True), "x")
    assert not plan.fits
    assert plan.settings.quantization == "nf4" and plan.settings.optim == "adamw_8bit"
    assert set(plan.reasons) == {field.name for field in fields(Settings)} - set(SHARING)
    assert any("GiB short" in reason and "weights take" in reason for reason in plan.reasons.values())
    said = why_not(plan, loaded)
    assert "weights take" in said and "try model=Qwen/Qwen2.5-3B-Instruct (then " in said
    assert plan.settings.offload_embeddings is True and plan.settings.lora["r"] == 4


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"])
@pytest.mark.parametrize("bf16", [False, True])
def test_more_memory_never_gives_lower_precision(recipe, model, bf16):
    loaded = recipe(model)
    plans = [make_plan(loaded, card(free, bf16), "x") for free in (1, 2, 3, 4, 6, 8, 11, 16, 24, 32, 80)]
    precisions = [PRECISION[plan.settings.quantization] for plan in plans]
    assert precisions == sorted(precisions)
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits)
    for plan in plans:
        assert plan.fits == (plan.memory["peak_bytes"] <= plan.memory["budget_bytes"])
        assert plan.settings.micro_batch_tokens >= row_tokens(loaded)


def test_a_tight_card_uses_less_at_once(recipe):
    roomy, tight = (make_plan(recipe("Qwen2.5-7B"), card(free), "x") for free in (14.0, 8.5))
    assert roomy.fits and tight.fits
    assert tight.settings.rollout_batch_size < roomy.settings.rollout_batch_size
    assert tight.settings.micro_batch_tokens < roomy.settings.micro_batch_tokens


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization", "nf4"),
        ("quantization", "int8"),
        ("quantization", "none"),
        ("compute_dtype", "float32"),
        ("gradient_checkpointing", True),
        ("gradient_checkpointing", False),
        ("gradient_checkpointing", 0),
        ("gradient_checkpointing", 1),
        ("gradient_checkpointing", 24),
        ("offload_checkpoints", True),
        ("offload_checkpoints", False),
        ("micro_batch_tokens", 1000),
        ("rollout_batch_size", 5),
        ("logits_tile_tokens", 100),
        ("optim", "adamw_8bit"),
        ("score_batch_tokens", 2000),
    ],
)
def test_a_pinned_setting_is_kept_and_the_others_adapt(recipe, key, value):
    plan = make_plan(recipe("Qwen2.5-0.5B", f"hardware.{key}={value}"), card(10.75), "x")
    assert getattr(plan.settings, key) == value and type(getattr(plan.settings, key)) is type(value)
    assert plan.reasons[key] == "set in the recipe"
    assert plan.fits


@pytest.mark.parametrize(
    ("model", "free", "pins", "said"),
    [
        ("Qwen2.5-7B", 10.75, ["hardware.quantization=none"], "hardware.quantization=auto (then "),
        (
            "Qwen2.5-1.5B",
            4,
            ["hardware.rollout_batch_size=64", "data.max_prompt_length=6000"],
            "hardware.rollout_batch_size=auto (then ",
        ),
        ("Qwen2.5-1.5B", 3, ["hardware.gradient_checkpointing=false"], "hardware.gradient_checkpointing=auto (then "),
        ("Qwen2.5-7B", 7.3, ["lora.r=256"], "lora.r=auto (then "),
    ],
)
def test_a_pin_that_does_not_fit_is_kept_and_named(recipe, model, free, pins, said):
    loaded = recipe(model, *pins)
    plan = make_plan(loaded, card(free), "x")
    assert not plan.fits and said in why_not(plan, loaded)


def test_a_change_that_is_advised_makes_it_fit(recipe):
    loaded = recipe("Qwen2.5-7B", "generation.max_completion_length=6000", "hardware.quantization=nf4")
    device = card(6.4)
    plan = make_plan(loaded, device, "x")
    advice = re.findall(r"generation\.max_completion_length=(\d+) \(then ([\d.]+) GiB", why_not(plan, loaded))
    assert not plan.fits and len(advice) == 1
    length, peak = int(advice[0][0]), float(advice[0][1])
    shorter = make_plan(
        recipe("Qwen2.5-7B", f"generation.max_completion_length={length}", "hardware.quantization=nf4"), device, "x"
    )
    longer = make_plan(
        recipe("Qwen2.5-7B", f"generation.max_completion_length={length + 32}", "hardware.quantization=nf4"),
        device,
        "x",
    )
    assert shorter.fits and not longer.fits
    assert shorter.memory["peak_bytes"] / GIB == pytest.approx(peak, abs=0.006)


def test_what_saves_memory_at_a_price_comes_in_order(recipe):
    """8-bit moments, then checkpoints in host memory, then the embedding, then a lower rank; each only when needed."""
    loaded = recipe("Qwen2.5-7B", "hardware.quantization=nf4")
    seen = []
    for free in (9, 8, 7.5, 7.2, 7.0, 6.6, 6.2, 6.0, 5.8, 5.7, 5.6):
        plan = make_plan(loaded, card(free), "x")
        chosen = plan.settings
        seen.append(
            (chosen.optim == "adamw_8bit", chosen.offload_checkpoints, chosen.offload_embeddings, -chosen.lora["r"])
        )
        if chosen.lora["r"] < 16:
            assert chosen.optim == "adamw_8bit" and chosen.offload_embeddings
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)
    assert [step[2] for step in seen] == sorted(step[2] for step in seen) and seen[-1][2]
    assert [step[3] for step in seen] == sorted(step[3] for step in seen)
    assert seen[0] == (False, False, False, -16)


def test_a_tied_embedding_cannot_leave_the_device(recipe):
    plan = make_plan(recipe("Qwen2.5-0.5B"), card(0.7), "x")
    assert plan.settings.offload_embeddings is False and "output head" in plan.reasons["offload_embeddings"]
    with pytest.raises(UserError, match=r"offload_embeddings: the embedding of .* is its output head"):
        make_plan(recipe("Qwen2.5-0.5B", "hardware.offload_embeddings=true"), card(8), "x")


def test_an_embedding_of_its_own_leaves_the_device_when_asked_to(recipe):
    here, away = (
        make_plan(recipe("Qwen2.5-7B", f"hardware.offload_embeddings={pin}"), card(16), "x")
        for pin in ("false", "true")
    )
    assert away.reasons["offload_embeddings"] == here.reasons["offload_embeddings"] == "set in the recipe"
    saved = [plan.memory["phases"]["export"]["embeddings"] for plan in (here, away)]
    assert saved[0] - saved[1] == 152064 * 3584 * 2


def test_passes_without_gradients_take_a_whole_group_where_the_update_cannot(recipe):
    loaded = recipe("Qwen2.5-7B", "hardware.quantization=nf4")
    plan = make_plan(loaded, card(8.5), "x")
    assert plan.fits and plan.settings.micro_batch_tokens < plan.settings.score_batch_tokens <= group_tokens(loaded)
    roomy = make_plan(loaded, card(24), "x")
    assert roomy.settings.score_batch_tokens == roomy.settings.micro_batch_tokens >= group_tokens(loaded)


def test_a_cpu_that_multiplies_four_bits_keeps_them_for_few_rows(recipe):
    def weights(fast, *pins, compiler=None):
        loaded = recipe("SmolLM2-135M", "hardware.quantization=nf4", *pins)
        device = replace(cpu(16), avx512_bf16=fast, compiler=compiler)
        return make_plan(loaded, device, "cpu").settings.rollout_weights

    few = ["hardware.rollout_batch_size=16"]
    assert weights(True, *few) == "quantized"
    assert weights(False, *few) == weights(True, "hardware.rollout_batch_size=64") == "dequantized"
    assert weights(True, "hardware.rollout_batch_size=64", compiler="/usr/bin/cc") == "quantized"


def recomputed(plan, layers):
    """Return how many layers the plan recomputes; all and none are said with true and false."""
    value = plan.settings.gradient_checkpointing
    assert type(value) is bool or 0 < value < layers
    return value * layers if type(value) is bool else value


@pytest.mark.parametrize(
    ("model", "layers", "budgets"), [("Qwen2.5-0.5B", 24, (2, 3, 4, 5, 6, 8)), ("Qwen2.5-7B", 28, (8, 9, 10, 12, 16))]
)
@pytest.mark.parametrize("pinned", [[], ["hardware.micro_batch_tokens=1024"]])
def test_the_fewest_layers_that_fit_are_recomputed(recipe, model, layers, budgets, pinned):
    loaded = recipe(model, "hardware.quantization=nf4", *pinned)
    group = 1024 if pinned else group_tokens(loaded)
    before, between = (0, 0), 0
    for free in budgets:
        device = card(free)
        plan = make_plan(loaded, device, "x")
        count, tokens = recomputed(plan, layers), plan.settings.micro_batch_tokens
        assert plan.fits and plan.settings.offload_checkpoints is False
        now = (min(tokens, group), -count)
        assert now >= before  # a group first, then fewer layers
        before, between = now, between + (0 < count < layers)
        if count:
            fewer = replace(plan.settings, gradient_checkpointing=count - 1)
            update = phases(model_dimensions(loaded.model), loaded, fewer, device)["update"]
            assert sum(update.values()) > plan.memory["budget_bytes"]
    assert between


def test_the_tokens_grow_beyond_a_group_only_when_nothing_is_recomputed(recipe):
    loaded = recipe("Qwen2.5-0.5B", "hardware.quantization=nf4")
    plans = [make_plan(loaded, card(free), "x") for free in (3, 4, 6, 8, 12, 16, 24)]
    assert {p.settings.micro_batch_tokens for p in plans if p.settings.gradient_checkpointing} == {group_tokens(loaded)}
    assert plans[-1].settings.gradient_checkpointing is False
    assert plans[-1].settings.micro_batch_tokens > group_tokens(loaded)


def test_checkpoints_go_to_host_memory_only_when_nothing_else_makes_it_fit(recipe):
    loaded = recipe("Qwen2.5-7B", "hardware.quantization=nf4")
    away, roomy = (make_plan(loaded, card(free), "x") for free in (7.2, 7.6))
    assert away.fits and roomy.fits
    assert [plan.settings.offload_checkpoints for plan in (away, roomy)] == [True, False]
    assert "memory is short" in away.reasons["offload_checkpoints"] and away.settings.optim == "adamw_8bit"


def test_a_cpu_says_that_there_is_nothing_to_offload(recipe):
    for pin in ("auto", "true", "false"):
        plan = make_plan(recipe("SmolLM2-135M", f"hardware.offload_checkpoints={pin}"), cpu(8), "cpu")
        assert plan.settings.offload_checkpoints is False
        assert "in host memory anyway" in plan.reasons["offload_checkpoints"]


def test_float32_doubles_the_weights(recipe):
    wide = make_plan(recipe("Qwen2.5-0.5B", "hardware.compute_dtype=float32"), cpu(32), "cpu")
    half = make_plan(recipe("Qwen2.5-0.5B"), cpu(32), "cpu")
    components = [plan.memory["phases"]["export"]["weights"] for plan in (wide, half)]
    assert components[0] == 2 * components[1]


def test_the_cpu_plans_from_ram_in_bfloat16(recipe):
    plan = make_plan(recipe("SmolLM2-135M"), cpu(8), "cpu")
    assert plan.fits and plan.settings.compute_dtype == "bfloat16"
    assert plan.settings.micro_batch_tokens <= 4096
    assert 256 <= plan.settings.logits_tile_tokens <= 512
    assert plan.memory["budget_bytes"] < 8 * GIB
    assert (
        make_plan(recipe("SmolLM2-135M", "hardware.quantization=int8"), cpu(8), "cpu").settings.compute_dtype
        == "bfloat16"
    )


def test_a_cpu_that_is_slow_in_16_bits_computes_in_float32_where_that_has_room(recipe):
    slow = replace(cpu(8), slow_half=True)
    plan = make_plan(recipe("SmolLM2-135M", "hardware.quantization=nf4"), slow, "cpu")
    assert plan.fits and plan.settings.compute_dtype == "float32" and "AVX-512" in plan.reasons["compute_dtype"]
    wide = make_plan(recipe("SmolLM2-135M"), slow, "cpu")
    assert wide.settings.compute_dtype == "float32" and "32-bit weights" in wide.reasons["quantization"]
    assert make_plan(recipe("Qwen2.5-7B"), slow, "cpu").settings.compute_dtype == "bfloat16"  # there is no room
    pinned = recipe("SmolLM2-135M", "hardware.compute_dtype=bfloat16")
    assert make_plan(pinned, slow, "cpu").settings.compute_dtype == "bfloat16"


def test_int8_on_a_card_computes_in_float16(recipe):
    plan = make_plan(recipe("Qwen2.5-0.5B", "hardware.quantization=int8"), card(10.75, bf16=True), "x")
    assert plan.settings.compute_dtype == "float16"


def test_the_context_is_only_taken_off_before_torch_has_it(recipe):
    loaded = recipe("Qwen2.5-0.5B")
    before, after = (
        make_plan(loaded, card(8, source=source), "x").memory["budget_bytes"] for source in ("nvml", "torch")
    )
    assert after - before == 141 * 1024**2


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ("Qwen2.5-0.5B", ["hardware.compute_dtype=bfloat16"], "bfloat16, which NVIDIA GeForce RTX 2080 Ti does not"),
        ("Qwen2.5-0.5B", ["hardware.compute_dtype=float32", "hardware.quantization=int8"], "take nf4"),
        ("gemma-3-1b", ["hardware.quantization=int8"], "overflows float16 and NVIDIA GeForce RTX 2080 Ti has no bf"),
        ("Qwen2.5-0.5B", ["hardware.micro_batch_tokens=100"], "got 100.*832 tokens"),
        ("Qwen2.5-0.5B", ["hardware.gradient_checkpointing=25"], "got 25, but .* has 24 layers; give at most 24"),
        ("gpt2", ["data.max_prompt_length=900"], "1220 tokens.*1024 positions"),
        ("Qwen2.5-0.5B", ["lora.target_modules=[q_prj]"], "did you mean 'q_proj'"),
    ],
)
def test_what_cannot_be_is_refused(recipe, model, overrides, message):
    with pytest.raises(UserError, match=message):
        make_plan(recipe(model, *overrides), card(10.75), "x")


def test_gemma3_is_planned_in_any_dtype(recipe):
    for free in (3, 6, 24):
        plan = make_plan(recipe("gemma-3-1b"), card(free, bf16=True), "x")
        assert plan.settings.compute_dtype == "bfloat16" and plan.settings.quantization != "int8"
    plan = make_plan(
        recipe("gemma-3-1b", "hardware.compute_dtype=float32", "hardware.quantization=nf4"), card(10.75), "x"
    )
    assert plan.settings.compute_dtype == "float32"
    plan = make_plan(recipe("gemma-3-1b"), card(10.75), "x")  # of a card without bfloat16
    assert plan.settings.compute_dtype == "float16" and plan.settings.quantization != "int8"
    assert "residual stream overflows float16 and is in float32" in plan.reasons["compute_dtype"]


def test_an_empty_card_gets_a_plan_that_does_not_fit(recipe):
    loaded = recipe("SmolLM2-135M")
    plan = make_plan(loaded, replace(card(1), free_bytes=0), "x")
    assert not plan.fits and plan.memory["budget_bytes"] == 0
    assert why_not(plan, loaded).endswith("a card with more free memory is needed")


def test_planning_imports_neither_torch_nor_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen2.5-0.5B"]))
    code = (
        "import sys\n"
        "from lowmem_rlhf.hardware.device import Device\n"
        "from lowmem_rlhf.planning.plan import make_plan\n"
        "from lowmem_rlhf.recipe.loading import load_recipe\n"
        f"recipe = load_recipe('grpo_gsm8k', ['model={tmp_path}'])\n"
        "make_plan(recipe, Device('cuda:0', 'x', 2**34, 2**33, (7, 5), False), 'x')\n"
        "print([name for name in ('torch', 'transformers', 'bitsandbytes') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
