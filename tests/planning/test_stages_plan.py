"""Plans of every algorithm: which adapters are counted, which phases there are, and which lengths bound them."""

from dataclasses import replace

import pytest
from planning_cases import CONFIGS, card, cpu

from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.profiles import find_profile, profile_device
from lowmem_rlhf.planning import shapes
from lowmem_rlhf.planning.advice import why_not
from lowmem_rlhf.planning.memory import phases as memory
from lowmem_rlhf.planning.memory.resident import Settings
from lowmem_rlhf.planning.plan import make_plan
from lowmem_rlhf.planning.time.estimate import run_time

LORA = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}
SETTINGS = Settings("nf4", "float16", True, False, 2048, 2048, 8, "quantized", 64, "adamw", LORA)
DIMS = dimensions_from_config(CONFIGS["Qwen2.5-0.5B"], "Qwen2.5-0.5B")
ONE = DIMS.lora_parameters(16)  # parameters of one adapter
LIKED = "{function: reward_adapter, name: NAME, options: {adapter: runs/reward_model}}"


def rewards(count: int) -> str:
    return f"rewards=[{', '.join(LIKED.replace('NAME', f'r{number}') for number in range(count))}]"


def of_pairs(*overrides: str) -> list[str]:
    return ["algorithm=reward_model", "rewards=[]", "data.answer=null", *overrides]


@pytest.fixture
def qwen(recipe):
    """Return a function that gives grpo_gsm8k for Qwen2.5-0.5B with overrides."""
    return lambda *overrides: recipe("Qwen2.5-0.5B", *overrides)


# (overrides, adapters that train, frozen ones)
ROLES = [
    ([], 1, 0),
    (["adapter=runs/sft"], 1, 1),
    (["algorithm=rloo"], 1, 0),
    (["algorithm=reinforce_plus_plus", "adapter=runs/sft"], 1, 1),
    (["algorithm=ppo"], 2, 0),
    (["algorithm=ppo", "ppo.critic=policy"], 1, 0),
    (["algorithm=ppo", "adapter=runs/sft"], 2, 1),
    (["algorithm=ppo", "adapter=runs/sft", rewards(1)], 2, 2),
    (["algorithm=ppo", "adapter=runs/sft", "ppo.critic=reward", rewards(2)], 2, 3),
    ([rewards(1)], 1, 1),
    (["algorithm=sft"], 1, 0),
    (["algorithm=sft", "adapter=runs/sft"], 1, 0),  # it is what trains
    (["algorithm=sft", rewards(1)], 1, 1),
    (of_pairs(), 1, 0),
    (of_pairs("adapter=runs/sft"), 1, 0),
]


@pytest.mark.parametrize(("overrides", "trained", "frozen"), ROLES)
def test_every_role_that_lies_on_the_base_is_counted(qwen, overrides, trained, frozen):
    loaded = qwen(*overrides)
    assert shapes.adapters_of(loaded) == (trained, frozen)
    phases = memory.phases(DIMS, loaded, SETTINGS, cpu(16))
    for name, phase in phases.items():
        # masters of 4 bytes for what trains; what is frozen is kept in 16 bits alone
        # an export is compared with the policy alone
        assert phase["adapters"] == ONE * (4 if name == "export" else 4 * trained + 2 * frozen), name
        assert phase.get("optimizer_state", 0) == (0 if name == "export" else 8 * ONE * trained)
        assert phase.get("gradients", 0) == (4 * ONE * trained if name in ("update", "optimizer") else 0)
    reason = make_plan(loaded, card(10.75), "x").reasons["lora"]
    more = f"{trained} adapters train and {frozen} are frozen"
    assert reason.endswith(more) == (trained + frozen > 1), reason


def test_ppo_needs_more_than_grpo_by_its_critic(qwen):
    grpo, ppo = (make_plan(qwen(f"algorithm={name}"), card(10.75), "x") for name in ("grpo", "ppo"))
    both = [sum(plan.memory["phases"]["optimizer"].values()) for plan in (grpo, ppo)]
    assert ppo.settings == grpo.settings
    assert both[1] - both[0] == pytest.approx(1.125 * 20 * ONE, rel=1e-3)  # 16 bytes, and a buffer of 4


# (overrides, adapters of the role with the most in scoring and in the update)
COPIES = [
    ([], 0, 1),  # the reference has none
    (["adapter=runs/sft"], 1, 1),
    (["algorithm=ppo"], 1, 1),
    (["algorithm=ppo", "adapter=runs/sft"], 2, 2),  # the critic's lies above the start
    (["algorithm=ppo", "adapter=runs/sft", "ppo.critic=policy"], 1, 1),
    (["algorithm=rloo"], 1, 1),
    ([rewards(1)], 1, 1),
    (of_pairs(), 1, 1),
]


@pytest.mark.parametrize(("overrides", "scoring", "update"), COPIES)
def test_adapters_are_copied_in_the_compute_dtype_for_the_role_that_computes(qwen, overrides, scoring, update):
    """A number a position is read from the states alone, so a critic's pass is the largest moment with a tiny tile."""
    tiny_tile = replace(SETTINGS, logits_tile_tokens=1)
    phases = memory.phases(DIMS, qwen(*overrides), tiny_tile, cpu(16))
    assert phases["scoring"]["adapter_copies"] == 2 * ONE * scoring
    assert phases["update"]["adapter_copies"] == 2 * ONE * update
    if "rollout" in phases:
        assert phases["rollout"]["adapter_copies"] == 2 * ONE


@pytest.mark.parametrize(
    ("without", "with_entropy"),
    [
        ([], ["grpo.entropy_coef=0.01"]),
        ([], ["grpo.use_adaptive_entropy=true"]),
        (["algorithm=rloo"], ["algorithm=rloo", "ppo.entropy_coef=0.01"]),
    ],
)
def test_an_entropy_bonus_holds_another_gradient_of_the_scored_states(qwen, without, with_entropy):
    wide = replace(DIMS, vocab_size=2_000_000)  # so that the loss is the largest moment
    updates = [memory.phases(wide, qwen(*one), SETTINGS, card(10.75))["update"] for one in (without, with_entropy)]
    plain, bonus = updates
    assert bonus["scored_states"] == pytest.approx(1.5 * plain["scored_states"])
    assert bonus["logits_tile"] > plain["logits_tile"]
    both = {"scored_states", "logits_tile", "allocator"}
    assert {key: plain[key] for key in plain.keys() - both} == {key: bonus[key] for key in bonus.keys() - both}


def test_tokens_of_high_entropy_take_passes_of_the_policy(qwen):
    plain, some = (
        memory.phases(DIMS, qwen(*one), SETTINGS, cpu(16)) for one in ([], ["grpo.top_entropy_quantile=0.2"])
    )
    assert some["scoring"]["adapter_copies"] == plain["update"]["adapter_copies"]
    assert not plain["scoring"]["adapter_copies"] and some["update"] == plain["update"]


@pytest.mark.parametrize(
    ("overrides", "sampled"),
    [
        ([], True),
        (["algorithm=ppo"], True),
        (["algorithm=sft"], True),
        (["algorithm=sft", "rewards=[]"], False),
        (["algorithm=sft", "data.eval_size=0"], False),
        (of_pairs(), False),
    ],
)
def test_there_is_a_rollout_only_where_something_is_sampled(qwen, overrides, sampled):
    plan = make_plan(qwen(*overrides), card(10.75), "x")
    names = ["rollout", "scoring", "update", "optimizer", "export"]
    assert list(plan.memory["phases"]) == (names if sampled else names[1:])
    assert plan.fits and set(plan.reasons) == set(plan.to_dict()["settings"])
    if not sampled:
        assert plan.settings.rollout_batch_size == 1
        assert plan.reasons["rollout_batch_size"] == "nothing is sampled"
    in_nf4 = make_plan(qwen("hardware.quantization=nf4", *overrides), cpu(16), "cpu")
    assert (in_nf4.settings.rollout_weights == "dequantized") == sampled


def test_sft_samples_no_more_than_its_evaluation(qwen):
    sizes = ["data.eval_size=24", "evaluation.num_samples=2", "generation.num_generations=1"]
    loaded = qwen("algorithm=sft", *sizes)
    plan = make_plan(loaded, card(10.75), "x")
    assert plan.settings.rollout_batch_size == 48
    assert plan.reasons["rollout_batch_size"].startswith("all of the evaluation: ")
    assert shapes.prompts_at_once(loaded, 48) == 24 and shapes.prompts_at_once(loaded, 1) == 1
    tight = make_plan(qwen("algorithm=sft", "data.max_prompt_length=6000", *sizes), card(2.5), "x")
    assert 0 < tight.settings.rollout_batch_size < 48
    assert tight.reasons["rollout_batch_size"].startswith("the most of 48 that fits: ")


def test_what_is_sampled_is_as_long_as_prompt_and_completion(qwen):
    """However long the examples of SFT are."""
    plans = []
    for length in (700, 4000):
        lengths = ["data.max_prompt_length=512", "generation.max_completion_length=128"]
        loaded = qwen("algorithm=sft", f"sft.max_length={length}", *lengths)
        plans.append(memory.phases(DIMS, loaded, replace(SETTINGS, rollout_batch_size=64), cpu(16))["rollout"])
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("overrides", "rows"), [(["algorithm=sft", "sft.max_length=700"], 1), (of_pairs("reward_model.max_length=700"), 2)]
)
def test_a_micro_batch_holds_the_longest_example(qwen, overrides, rows):
    loaded = qwen(*overrides, "training.prompts_per_step=4")
    assert (shapes.row_tokens(loaded), shapes.group_tokens(loaded)) == (700, 700 * rows)
    plan = make_plan(loaded, card(24), "x")
    assert plan.settings.micro_batch_tokens == shapes.step_tokens(loaded) == 2800 * rows
    key = f"{loaded.algorithm}.max_length"
    with pytest.raises(UserError, match=rf"hardware.micro_batch_tokens: got 699.* 700 tokens.*lower {key}$"):
        make_plan(qwen(*overrides, "hardware.micro_batch_tokens=699"), card(10.75), "x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm=sft", "sft.max_length=1025"],
            r"^sft.max_length 1025 makes 1025 tokens.*1024 positions; lower it$",
        ),
        (of_pairs("reward_model.max_length=2000"), r"^reward_model.max_length 2000 makes 2000 tokens.*; lower it$"),
        (
            ["algorithm=sft", "data.max_prompt_length=800", "generation.max_completion_length=225"],
            r"^data.max_prompt_length 800 and generation.max_completion_length 225 make 1025 .*; lower one of them$",
        ),
    ],
)
def test_lengths_that_the_model_has_no_positions_for(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        make_plan(recipe("gpt2", *overrides), card(10.75), "x")


def test_lengths_that_nothing_has_are_not_checked(recipe):
    nothing_sampled = ["rewards=[]", "data.max_prompt_length=800", "generation.max_completion_length=900"]
    assert make_plan(recipe("gpt2", "algorithm=sft", *nothing_sampled), card(10.75), "x").fits
    assert make_plan(recipe("gpt2", *of_pairs(*nothing_sampled[1:])), card(10.75), "x").fits


@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [
        (["data.max_prompt_length=7000"], ["data.max_prompt_length"]),
        (["algorithm=sft", "rewards=[]", "sft.max_length=7500"], ["sft.max_length"]),
        (of_pairs("reward_model.max_length=7500"), ["reward_model.max_length"]),
    ],
)
def test_what_does_not_fit_names_the_lengths_that_matter(recipe, overrides, lengths):
    pins = ["hardware.quantization=nf4", "hardware.optim=adamw_8bit", "hardware.gradient_checkpointing=true"]
    loaded = recipe("Qwen2.5-1.5B", *pins, *overrides)
    plan = make_plan(loaded, card(1.9), "x")
    said = why_not(plan, loaded)
    assert not plan.fits and any(f"{key}=" in said for key in lengths), said


def test_a_classifier_has_no_plan(qwen):
    data = ["data.template=null", "data.text=text", "data.label=label", "rewards=[]"]
    with pytest.raises(UserError, match=r"a classifier has no plan.* classifier.batch_tokens \(512\)") as caught:
        make_plan(qwen("algorithm=classifier", "classifier.batch_tokens=512", *data), card(10.75), "x")
    assert "\n" not in str(caught.value)


FOLLOWS = ["grpo.beta=0.04", "grpo.sync_ref_model=true"]


@pytest.mark.parametrize("start", [[], ["adapter=runs/sft"]])
@pytest.mark.parametrize("times", [2, 4])
def test_a_reference_that_follows_the_policy_is_counted(qwen, start, times):
    """An adapter of so many times the policy's rank, fp32, in place of the frozen start; it computes in 16 bits."""
    loaded = qwen(*start, *FOLLOWS, f"grpo.ref_model_rank_multiple={times}")
    assert shapes.adapters_of(loaded) == (1, 0)
    phases = memory.phases(DIMS, loaded, SETTINGS, cpu(16))
    assert {phases[name]["adapters"] for name in ("rollout", "scoring", "update")} == {4 * ONE * (1 + times)}
    assert phases["export"]["adapters"] == 4 * ONE
    of_scoring = memory.phases(DIMS, loaded, replace(SETTINGS, logits_tile_tokens=1), cpu(16))["scoring"]
    assert of_scoring["adapter_copies"] == 2 * ONE * times
    beside_one = 4 * (times + 1) * 16 * (896 + 4864)  # the stacked factors of the largest layer
    assert phases["optimizer"]["update_buffers"] == 5 * beside_one
    on_card, still = (make_plan(one, card(10.75), "x") for one in (loaded, qwen(*start, "grpo.beta=0.04")))
    more = on_card.memory["host"]["trained_state"] - still.memory["host"]["trained_state"]
    assert more == 4 * ONE * times and on_card.settings.lora["r"] == still.settings.lora["r"] == 16
    assert on_card.reasons["lora"].endswith(f"the reference follows the policy in an adapter of rank {16 * times}")


def test_the_time_of_a_reference_that_follows_is_that_of_its_passes_and_of_its_moves(qwen):
    device = profile_device(find_profile("rtx-2080-ti"))
    still, rare, often = (
        run_time(DIMS, qwen("grpo.beta=0.04", *more), SETTINGS, device).phases
        for more in ([], FOLLOWS, [*FOLLOWS, "grpo.ref_model_sync_steps=1"])
    )
    assert still["score"] < rare["score"] == often["score"] < 1.5 * still["score"]
    assert still["rollout"] == rare["rollout"]
    assert still["update"] < rare["update"] < 1.001 * still["update"] < often["update"]
    once = often["update"] - rare["update"]
    assert once * 512 / 511 + still["update"] == pytest.approx(often["update"])
