"""Every key of a recipe, set to another value, changes something that can be seen.

Most are seen here: in the plan of a card, or in what pure functions and tiny models make of the key. The others are
in `ELSEWHERE`, each with the test that sets it and sees what it does. A new key without either fails here.
"""

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from effects_of_data import DATA, classifier, similarity
from effects_of_learning import LEARNED, grpo_gradient

from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.kinds import item_of
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.section import Section
from lowmem_rlhf.recipe.sections import REWARD_OPTIONS
from lowmem_rlhf.recipe.values import section_of

TESTS = Path(__file__).resolve().parents[1]
CARD = ("hardware.profile=rtx-2080-ti", "model=Qwen/Qwen2.5-1.5B-Instruct")
PLANNED = {
    "grpo_gsm8k": (
        *("model=Qwen/Qwen2.5-0.5B-Instruct", "revision=v2", "algorithm=rloo", "adapter=runs/sft"),
        *("hardware.profile=rtx-4090", "hardware.vram=8GB"),
        *("hardware.quantization=nf4", "hardware.compute_dtype=float32", "hardware.gradient_checkpointing=true"),
        *("hardware.offload_checkpoints=true", "hardware.micro_batch_tokens=1024", "hardware.score_batch_tokens=1024"),
        *("hardware.rollout_batch_size=7", "hardware.rollout_weights=dequantized", "hardware.keep_graphs=true"),
        *("hardware.logits_tile_tokens=7", "hardware.optim=adamw_8bit"),
        *("lora.r=7", "lora.lora_alpha=5", "lora.use_rslora=true", "lora.target_modules=[q_proj]"),
        *("lora.layers_to_transform=8-15", "lora.rank_pattern={q_proj: 4}", "lora.alpha_pattern={q_proj: 4}"),
        *("data.max_prompt_length=256", "data.eval_size=64", "generation.num_generations=16"),
        *("generation.max_completion_length=512", "generation.temperature=0.5", "generation.top_p=0.5"),
        *("generation.top_k=3", "generation.min_p=0.01", "generation.repetition_penalty=1.1"),
        *("generation.min_new_tokens=3", "grpo.beta=0", "grpo.top_entropy_quantile=0.5", "grpo.entropy_coef=0.01"),
        *("grpo.use_adaptive_entropy=true", "grpo.sync_ref_model=true", "grpo.num_iterations=2"),
        *("training.max_steps=200", "training.prompts_per_step=16", "evaluation.num_samples=2", "evaluation.steps=7"),
    ),
    "grpo_gsm8k grpo.sync_ref_model=true": ("grpo.ref_model_rank_multiple=4", "grpo.ref_model_sync_steps=7"),
    "grpo_gsm8k generation.engine=vllm": (
        *("generation.server.sleep=true", "generation.server.gpu_memory_utilization=0.5"),
        "generation.server.devices=1",
    ),
    "grpo_gsm8k generation.engine=llama_cpp": ("generation.server.parallel=4",),
    "grpo_gsm8k model=Qwen/Qwen2.5-7B-Instruct": ("hardware.offload_embeddings=true",),
    "ppo_reward_adapter": (
        *("ppo.num_ppo_epochs=8", "ppo.entropy_coef=0.01", "ppo.critic=policy", "ppo.bootstrap_truncated=true"),
        "ppo.score_position=after_last",
    ),
    "sft_chat": ("sft.max_length=2048",),
    "reward_model": ("reward_model.max_length=2048",),
    "dpo": ("trl.max_length=300",),
}
SERVER = "rollout/test_vllm_server.py"
SUPERVISED = "training/test_supervised_training.py"
ELSEWHERE = {
    "training.ddp_timeout": (
        "processes/test_process_faults.py::test_a_slow_network_slows_and_one_that_is_cut_ends_the_run_with_a_sentence"
    ),
    "description": "export/test_card.py::test_the_card_tells_what_was_measured",
    "trust_remote_code": "faults/test_foreign_runs.py::test_a_foreign_algorithm_and_a_model_s_own_code_are_asked_for",
    "hardware.offload_experts": (
        "planning/test_unlike_layers.py::test_experts_in_host_memory_where_there_are_none_to_move"
    ),
    "hardware.shard_base": "planning/test_shared_layers.py::test_a_shared_base_is_held_in_parts_and_gathered",
    "hardware.offload_base": "planning/test_shared_layers.py::test_a_shared_base_is_held_in_parts_and_gathered",
    "hardware.check": "integration/test_padded_run.py::test_a_tested_type_is_checked_on_request_only",
    "hardware.probe": "training/test_probe.py::test_the_probe_knows_whether_an_unknown_model_fits",
    "data.config": "data/test_sources.py::test_hub_layout",
    "data.train_split": "data/test_sources.py::test_parts_of_splits",
    "data.eval_split": "data/test_sources.py::test_hub_layout",
    "generation.stop_strings": (
        "integration/test_runs_with_stop_strings.py::test_completions_that_a_stop_string_ends_are_whole"
    ),
    "generation.engine": "integration/test_extensions.py::test_an_engine_from_outside_samples_what_is_trained_on",
    "generation.server.url": f"{SERVER}::test_nobody_answers",
    "generation.server.command": f"{SERVER}::test_a_server_is_started_beside_and_ends_with_the_engine",
    "generation.server.options": f"{SERVER}::test_a_server_is_started_beside_and_ends_with_the_engine",
    "generation.server.model": f"{SERVER}::test_where_the_server_is_and_what_it_is_told",
    "generation.server.adapters": f"{SERVER}::test_where_the_server_is_and_what_it_is_told",
    "generation.server.api_key_env": f"{SERVER}::test_where_the_server_is_and_what_it_is_told",
    "generation.server.timeout": f"{SERVER}::test_what_a_server_does_wrong_ends_the_run_with_a_sentence",
    "generation.server.start_timeout": f"{SERVER}::test_a_program_that_never_answers_is_ended",
    "generation.server.allow_remote": f"{SERVER}::test_prompts_go_nowhere_else_than_is_allowed",
    "mixing.normalize": "integration/test_several_tasks.py::test_each_task_s_rewards_are_standardised_if_asked",
    "grpo.ref_model_mixup_alpha": "training/test_sync_ref_model.py::test_the_kl_is_that_from_the_reference_as_it_is",
    "grpo.max_generation_batches": (
        "training/test_dynamic_sampling.py::test_dull_groups_are_replaced_and_a_resumed_run_is_the_uninterrupted_one"
    ),
    "grpo.set_aside_steps": (
        "training/test_dynamic_sampling.py::test_dull_groups_are_replaced_and_a_resumed_run_is_the_uninterrupted_one"
    ),
    "ppo.target_kl": ("training/test_ppo_update.py::test_a_policy_that_went_too_far_ends_the_step_before_it_goes_on"),
    "ppo.critic_warmup_steps": "training/test_critic_settings.py::test_in_its_first_steps_the_critic_learns_alone",
    "sft.eval_steps": f"{SUPERVISED}::test_a_resumed_run_is_the_uninterrupted_one",
    "reward_model.center_rewards_coefficient": (f"{SUPERVISED}::test_a_reward_model_is_bradley_terry_whatever_is_cut"),
    "reward_model.eval_steps": f"{SUPERVISED}::test_a_resumed_run_is_the_uninterrupted_one",
    "classifier.max_length": "integration/test_stages.py::test_wrong_input_is_one_sentence_before_anything_is_written",
    "classifier.batch_tokens": "planning/test_stages_plan.py::test_a_classifier_has_no_plan",
    "training.save_steps": "training/test_training_loop.py::test_checkpoints_come_every_save_steps_and_at_the_end",
    "training.save_total_limit": (
        "training/test_training_loop.py::test_checkpoints_come_every_save_steps_and_at_the_end"
    ),
    "training.log_completions": (
        "integration/test_runs_with_stop_strings.py::test_completions_that_a_stop_string_ends_are_whole"
    ),
    "training.report_to": "training/test_trackers.py::test_a_tracker_that_fails_is_said_once_and_told_nothing_more",
    "evaluation.temperature": "evaluation/test_eval_runs.py::test_pass_at_k_and_accuracy_follow_from_the_answers",
    "rewards.timeout": "rewards/test_texts.py::test_the_time_limit_of_a_reward_ends_a_slow_pattern",
    "rewards.options.classifier.model": "rewards/test_learned.py::test_batches_give_what_one_text_at_a_time_gives",
    "rewards.options.similarity.model": "rewards/test_similarity.py::test_pooling_is_what_the_model_s_files_say",
    "rewards.options.reward_adapter.adapter": (
        "integration/test_ppo_runs.py::test_the_reward_adapter_says_what_the_reward_model_says"
    ),
}
REVISIONS = ("rewards.options.classifier.revision", "rewards.options.similarity.revision")
BEFORE: dict[tuple[Callable[..., Any], str], Any] = {}


@cache
def plan_of(recipe: str, change: str = "") -> str:
    """Return all that a plan says, as text; behind a recipe's name stands what is set in it."""
    name, *given = recipe.split()
    return str(plan_recipe(load_recipe(name, [*CARD, *given, *([change] if change else [])], quiet=True)).to_dict())


@pytest.mark.parametrize(
    ("recipe", "change"), [(recipe, one) for recipe, changes in PLANNED.items() for one in changes]
)
def test_a_key_that_the_plan_counts_with_changes_it(recipe, change):
    assert plan_of(recipe, change) != plan_of(recipe)


def before(seen: Callable[..., Any], beside: dict[str, Any]) -> Any:
    """Return what is seen without the change: twice the same, or a difference would mean nothing."""
    place = seen, repr(sorted(beside.items()))
    if place not in BEFORE:
        BEFORE[place] = seen(**beside)
        assert seen(**beside) == BEFORE[place]
    return BEFORE[place]


@pytest.mark.parametrize(
    ("key", "seen", "value", "beside"), [*LEARNED, *DATA], ids=[case[0] for case in (*LEARNED, *DATA)]
)
def test_a_key_changes_what_it_is_for(key, seen, value, beside):
    assert seen(**{**beside, key.rpartition(".")[2]: value}) != before(seen, beside)


@pytest.mark.parametrize(("key", "reward"), list(zip(REVISIONS, (classifier, similarity), strict=True)))
def test_a_reward_s_model_is_read_at_its_revision(key, reward, monkeypatch):
    from lowmem_rlhf.rewards import encoder

    asked = []
    for place, name in ((encoder.AutoTokenizer, "from_pretrained"), (encoder, "load_whole")):
        real = getattr(place, name)
        monkeypatch.setattr(
            place, name, lambda *args, _real=real, **given: asked.append(given["revision"]) or _real(*args, **given)
        )
    assert reward(revision="v2") and asked == ["v2", "v2"]


def test_each_loss_has_a_gradient_of_its_own():
    needed = {"luspo": {"importance_sampling_level": "sequence"}, "cispo": {"epsilon_high": 1.2}}
    kinds = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "vespo")
    every = {kind: grpo_gradient(loss_type=kind, **needed.get(kind, {})) for kind in kinds}
    same = [(a, b) for place, a in enumerate(kinds) for b in kinds[place + 1 :] if every[a] == every[b]]
    assert same == [("dapo", "bnpo")]


def keys(section: type[Section] = Recipe, above: str = "") -> Iterator[str]:
    """Yield the keys of a recipe; a task's data and rewards, whose keys are a recipe's own, are one key each."""
    for name, field in section.model_fields.items():
        inner = section_of(item_of(field.annotation) or field.annotation)
        shared = section is not Recipe and name in Recipe.model_fields and inner is not None
        if inner is None or (shared and name in ("data", "rewards")):
            yield f"{above}{name}"
        else:
            yield from keys(inner, f"{above}{name}.")


def test_every_key_is_seen_to_do_something():
    every = [*keys(), *(f"rewards.options.{name}.{key}" for name, one in REWARD_OPTIONS.items() for key in keys(one))]
    planned = {"trl" if one.startswith("trl.") else one.partition("=")[0] for own in PLANNED.values() for one in own}
    here = planned | {case[0] for case in (*LEARNED, *DATA)} | set(REVISIONS)
    assert sorted(here | ELSEWHERE.keys()) == sorted(every)
    assert not here & ELSEWHERE.keys()


def test_the_tests_that_see_the_others_exist_and_name_them():
    for key, test in ELSEWHERE.items():
        path, _, name = test.partition("::")
        text = (TESTS / path).read_text(encoding="utf-8")
        assert name in {one.name for one in ast.parse(text).body if isinstance(one, ast.FunctionDef)}, test
        assert key.rpartition(".")[2] in text, (key, test)
