"""What stands on the recipe's fields is what plans, resumes, probes, evaluations and model cards go by."""

import pytest

from lowmem_rlhf.recipe.field_roles import fields_with, keys_with, role_of
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import HardwareConfig, TrainingConfig


@pytest.mark.parametrize("section", [HardwareConfig, TrainingConfig])
def test_every_field_has_a_role(section):
    assert [name for name, field in section.model_fields.items() if role_of(field) is None] == []


def test_settings_that_change_numbers():
    assert fields_with(HardwareConfig, changes_numbers=True) == ("quantization", "compute_dtype", "optim")
    assert fields_with(TrainingConfig, changes_numbers=True) == (
        *("max_steps", "num_train_epochs", "prompts_per_step", "learning_rate", "lr_scheduler_type", "warmup_steps"),
        *("weight_decay", "max_grad_norm", "seed"),
    )


def test_settings_that_only_cut_the_work():
    assert fields_with(HardwareConfig, only_batching=True) == (
        *("micro_batch_tokens", "score_batch_tokens", "rollout_batch_size", "logits_tile_tokens"),
    )
    assert fields_with(HardwareConfig, only_batching=True, changes_numbers=True) == ()


def test_what_is_loaded_stays_as_it_is():
    assert fields_with(HardwareConfig, fixed_once_loaded=True) == (
        *("quantization", "compute_dtype", "offload_embeddings", "offload_experts", "optim"),
    )


def test_what_a_trl_run_is_advised_to_leave_to_the_plan():
    assert fields_with(HardwareConfig, trl_advises_auto=True) == (
        *("quantization", "compute_dtype", "gradient_checkpointing", "micro_batch_tokens", "optim"),
    )


def test_what_a_resume_may_change():
    assert keys_with(Recipe, may_change_on_resume=True) == (
        "hardware.*",
        *("generation.server", "rewards[].timeout", "rewards[].on_error"),
        *("training.max_steps", "training.num_train_epochs", "training.ddp_timeout", "training.save_steps"),
        *("training.save_total_limit", "training.log_completions", "training.report_to"),
        *("evaluation.steps", "evaluation.keep_best", "evaluation.patience", "evaluation.min_delta"),
    )


def test_what_an_evaluation_may_change():
    assert keys_with(Recipe, may_change_in_evaluation=True) == (
        *("generation.*", "rewards"),
        *("hardware.micro_batch_tokens", "hardware.score_batch_tokens", "hardware.rollout_batch_size"),
        *("hardware.logits_tile_tokens", "data.eval", "data.eval_size", "data.max_prompt_length", "data.long_prompts"),
        *("evaluation.accuracy", "evaluation.temperature", "evaluation.num_samples"),
    )


def test_a_role_that_does_not_exist_is_an_error():
    with pytest.raises(AttributeError, match="changes_number"):
        fields_with(HardwareConfig, changes_number=True)
