"""A key that is set changes something that can be seen without training: the plan of a card, or a token's loss.

Covered are the keys that the plan counts with and those of GRPO's losses; what the others change is held by the tests
of the room that reads them.
"""

from functools import cache

import pytest
import torch

from lowmem_rlhf.algorithms.grpo.inputs import LossInputs
from lowmem_rlhf.algorithms.grpo.losses import LOSSES
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import load_recipe

CARD = ("hardware.profile=rtx-2080-ti", "model=Qwen/Qwen2.5-1.5B-Instruct")
PLANNED = {
    "grpo_gsm8k": (
        *("model=Qwen/Qwen2.5-0.5B-Instruct", "hardware.profile=rtx-4090", "hardware.vram=8GB"),
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
    "ppo_reward_adapter": (
        *("ppo.num_ppo_epochs=8", "ppo.entropy_coef=0.01", "ppo.critic=policy", "ppo.bootstrap_truncated=true"),
        "ppo.score_position=after_last",
    ),
    "sft_chat": ("sft.max_length=2048",),
    "reward_model": ("reward_model.max_length=2048",),
}


@cache
def plan_of(recipe: str, change: str = "") -> str:
    """Return all that a plan says, as text."""
    overrides = [*CARD, change] if change else [*CARD]
    return str(plan_recipe(load_recipe(recipe, overrides, quiet=True)).to_dict())


@pytest.mark.parametrize(
    ("recipe", "change"), [(recipe, one) for recipe, changes in PLANNED.items() for one in changes]
)
def test_a_key_that_the_plan_counts_with_changes_it(recipe, change):
    assert plan_of(recipe, change) != plan_of(recipe)


LOSS_KEYS = [
    ("grpo", {"delta": 1.3}),
    ("grpo", {"importance_sampling_level": "sequence"}),
    ("grpo", {"use_bias_correction_kl": False}),
    ("sapo", {"sapo_temperature_pos": 2.0}),
    ("sapo", {"sapo_temperature_neg": 2.0}),
    ("vespo", {"vespo_k_pos": 1.0}),
    ("vespo", {"vespo_lambda_pos": 1.0}),
    ("vespo", {"vespo_k_neg": 1.0}),
    ("vespo", {"vespo_lambda_neg": 1.0}),
]


def token_losses(kind: str, epsilon: float = 0.2, high: float = 0.3, beta: float = 0.04, **own) -> torch.Tensor:
    """Return the losses of ten tokens of three completions, the first and last with an advantage below 0."""
    logps, old, ref = torch.randn((3, 10), generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    rows = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    lengths = torch.tensor([2.0, 5.0, 3.0], dtype=torch.float64)[rows]
    settings = GRPOSettings.model_construct(loss_type=kind, **own)
    given = (logps, old, ref, lengths - 3.5, lengths, None, 3, 10, 8, epsilon, high, beta, rows, 3)

    return LOSSES[kind](LossInputs(*given, settings=settings))


@pytest.mark.parametrize(("kind", "own"), LOSS_KEYS, ids=[next(iter(own)) for _, own in LOSS_KEYS])
def test_a_key_of_a_loss_changes_it(kind, own):
    assert not torch.equal(token_losses(kind, **own), token_losses(kind))


def test_epsilons_beta_and_the_loss_s_name_change_the_loss():
    plain = token_losses("grpo")
    for other in ({"epsilon": 0.1}, {"high": 0.1}, {"beta": 0.0}):
        assert not torch.equal(token_losses("grpo", **other), plain)
    every = [token_losses(kind) for kind in LOSSES if kind != "luspo"]
    same = [(a, b) for i, a in enumerate(every) for b in every[i + 1 :] if torch.equal(a, b)]
    assert len(same) == 1  # dapo and bnpo
