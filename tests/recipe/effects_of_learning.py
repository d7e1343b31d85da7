"""What the keys of a recipe do to losses, advantages, coefficients and optimizer steps. Not a test module.

A case is a key, what is observed, its other value, and the values that it is seen beside.
"""

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import CPU, tiny_base

from lowmem_rlhf.algorithms.common.epochs import with_epochs
from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings, updates
from lowmem_rlhf.algorithms.grpo.entropy import EntropyCoefficient
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.ppo.policy_gradient import CriticValues, ScoredRollout
from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.data.curriculum import stream_of
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.rollout.scores import Scores
from lowmem_rlhf.training.loop import own_rate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from ppo_cases import base_with, ppo_batch, ppo_gradients, targets_of
from training_cases import drawn_with, gradients, limits_of, logps_of, ragged_batch, shifted, stepper_of


def recipe_of(algorithm: str = "grpo", **sections: Any) -> Recipe:
    """Return a recipe that nothing has to be there for."""
    rows = {"data": {"train": "arithmetic"}, "rewards": ["length"]}
    return validate_recipe({"model": "none", "algorithm": algorithm, **rows, **sections})


@cache
def policy() -> tuple[SharedBase, Rollout, dict[str, Any]]:
    """Return a base, a batch whose tokens another policy has drawn, and what an update of it compares with."""
    base, batch = tiny_base("llama")[0], ragged_batch()
    logps = logps_of(base, batch, POLICY)
    given = {"ref": shifted(logps, seed=6), "old_logps": shifted(logps, seed=7)}
    return base, drawn_with(batch, shifted(logps, 0.8, seed=8)), given


def grpo_gradient(**grpo: Any) -> Any:
    base, batch, given = policy()
    stats, found = gradients(base, batch, GRPOSettings.model_validate(grpo), limits_of(), **given)
    return stats.loss, [one.tolist() for one in found.values()]


def entropy_coefficients(**grpo: Any) -> Any:
    coefficient = EntropyCoefficient(GRPOSettings.model_validate(grpo))
    seen = []
    for nats in (0.1, 0.1, 0.25, 0.25, 0.25):
        coefficient.update(nats)
        seen.append((coefficient.value, coefficient.applied))
    return seen


def grpo_advantages(**grpo: Any) -> Any:
    learner = resolve(recipe_of().spec.learner)(recipe_of(grpo=grpo))
    rollout = SimpleNamespace(scored=SimpleNamespace(total=[1.0, 0.0, 3.0, 0.5]), num_generations=2)
    return learner._advantages(rollout)


def ppo_targets(algorithm: str = "ppo", **ppo: Any) -> Any:
    """Return what is learned of two prompts' four completions, one of them cut, in the first of several steps."""
    learner = resolve(recipe_of(algorithm).spec.learner)(
        recipe_of(algorithm, ppo=ppo, generation={"num_generations": 2}, training={"prompts_per_step": 2})
    )
    lengths, draw = (2, 3, 1, 4), torch.Generator(CPU).manual_seed(0)
    completions = [Completion([5] * n, [0.0] * n, row == 3) for row, n in enumerate(lengths)]
    rollout = Rollout([[7], [7]], completions, 2, scores=Scores({}, [1.0, -0.5, 3.0, 2.0]))
    numbers = [
        {row: torch.randn(n, generator=draw, dtype=torch.float32, device=CPU) for row, n in enumerate(lengths)}
        for _ in range(3)
    ]
    scores = learner._shaped(rollout, range(4), CPU)
    estimator, values = learner.settings.kl_estimator, CriticValues(numbers[2])
    made, metrics = learner.penalized(ScoredRollout(rollout, range(4), *numbers[:2], scores, estimator, values))
    learned = [[one.tolist() for one in rows.values()] for rows in (made.advantages, made.returns or {})]
    return learned, metrics, learner.kl.value


@cache
def critic() -> tuple[SharedBase, Rollout, Any]:
    base, batch = base_with("adapter"), ppo_batch()
    return base, batch, targets_of(base, batch)


def ppo_gradient(**ppo: Any) -> Any:
    _, found = ppo_gradients(*critic(), PPOSettings.model_validate(ppo), limits_of())
    return [one.tolist() for one in found.values()]


def critic_rate(**ppo: Any) -> Any:
    return own_rate(recipe_of("ppo", ppo=ppo), critic()[0])


def weights_after(**training: Any) -> Any:
    """Return a parameter after each of four steps with gradients of different sizes."""
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float32, device=CPU))
    optimizer, seen = stepper_of({"p": parameter}, total=4, **training), []
    for size in (0.5, 4.0, 1.0, 2.0):
        parameter.grad = torch.full((2,), size, dtype=torch.float32, device=CPU)
        optimizer.step()
        seen.append(parameter.tolist())
    return seen


def prompts_seen(**training: Any) -> Any:
    examples = [Example(str(n), [n], {}) for n in range(20)]
    stream = stream_of(examples, recipe_of(training=training))
    return [one.prompt for step in range(2) for one in stream.batch(step)]


SAPO, VESPO = {"loss_type": "sapo"}, {"loss_type": "vespo"}
CORRECTED = {"importance_sampling_correction": True, "importance_sampling_mode": "token_truncate"}
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.01}
ADAPTIVE_KL = {"kl_target": 2.0, "kl_horizon": 100}
LEARNED: list[tuple[str, Any, Any, dict[str, Any]]] = [
    ("grpo.beta", grpo_gradient, 0.04, {}),
    ("grpo.epsilon", grpo_gradient, 0.1, {}),
    ("grpo.epsilon_high", grpo_gradient, 0.3, {}),
    ("grpo.loss_type", grpo_gradient, "grpo", {}),
    ("grpo.importance_sampling_level", grpo_gradient, "sequence", {}),
    ("grpo.delta", grpo_gradient, 1.3, {}),
    ("grpo.use_bias_correction_kl", grpo_gradient, False, {"beta": 0.04}),
    ("grpo.off_policy_mask_threshold", grpo_gradient, 0.02, {}),
    ("grpo.sapo_temperature_pos", grpo_gradient, 2.0, SAPO),
    ("grpo.sapo_temperature_neg", grpo_gradient, 2.0, SAPO),
    ("grpo.vespo_k_pos", grpo_gradient, 1.0, VESPO),
    ("grpo.vespo_lambda_pos", grpo_gradient, 1.0, VESPO),
    ("grpo.vespo_k_neg", grpo_gradient, 1.0, VESPO),
    ("grpo.vespo_lambda_neg", grpo_gradient, 1.0, VESPO),
    ("grpo.mask_truncated_completions", grpo_gradient, True, {}),
    ("grpo.importance_sampling_correction", grpo_gradient, True, {}),
    ("grpo.importance_sampling_mode", grpo_gradient, "token_mask", {**CORRECTED, "importance_sampling_clip_max": 1.1}),
    ("grpo.importance_sampling_clip_max", grpo_gradient, 1.1, CORRECTED),
    ("grpo.importance_sampling_clip_min", grpo_gradient, 0.9, CORRECTED),
    ("grpo.use_adaptive_entropy", entropy_coefficients, True, {"entropy_coef": 0.01}),
    ("grpo.entropy_target", entropy_coefficients, 0.3, ADAPTIVE),
    ("grpo.entropy_coef_delta", entropy_coefficients, 0.002, ADAPTIVE),
    ("grpo.entropy_coef_min", entropy_coefficients, 0.008, ADAPTIVE),
    ("grpo.entropy_coef_max", entropy_coefficients, 0.012, ADAPTIVE),
    ("grpo.scale_rewards", grpo_advantages, "none", {}),
    ("ppo.kl_coef", ppo_targets, 0.5, {}),
    ("ppo.kl_estimator", ppo_targets, "k3", {}),
    ("ppo.kl_target", ppo_targets, 2.0, {}),
    ("ppo.kl_horizon", ppo_targets, 50, ADAPTIVE_KL),
    ("ppo.gamma", ppo_targets, 0.9, {}),
    ("ppo.missing_eos_penalty", ppo_targets, 1.0, {}),
    ("ppo.normalize_scores", ppo_targets, "batch", {}),
    ("ppo.cliprange_reward", ppo_targets, 1.5, {}),
    ("ppo.lam", ppo_targets, 0.5, {}),
    ("ppo.normalize_values", ppo_targets, True, {}),
    ("ppo.whiten_rewards", ppo_targets, True, {}),
    ("ppo.normalize_advantages", ppo_targets, True, {"algorithm": "rloo"}),
    ("ppo.group_baseline", ppo_targets, True, {"algorithm": "reinforce_plus_plus"}),
    ("ppo.cliprange", ppo_gradient, 0.1, {}),
    ("ppo.entropy_coef", ppo_gradient, 0.01, {}),
    ("ppo.vf_coef", ppo_gradient, 0.5, {}),
    ("ppo.cliprange_value", ppo_gradient, 0.05, {}),
    ("ppo.critic_learning_rate", critic_rate, 1e-3, {}),
    ("ppo.critic_max_grad_norm", critic_rate, 0.5, {}),
    ("ppo.num_mini_batches", lambda **ppo: updates(recipe_of("ppo", ppo=ppo)), 2, {}),
    ("training.learning_rate", weights_after, 0.1, {}),
    ("training.lr_scheduler_type", weights_after, "cosine", {"learning_rate": 0.1}),
    ("training.warmup_steps", weights_after, 2, {"learning_rate": 0.1}),
    ("training.weight_decay", weights_after, 0.1, {"learning_rate": 0.1}),
    ("training.max_grad_norm", weights_after, 0.1, {"learning_rate": 0.1, "max_grad_norm": 9.0}),
    ("training.seed", prompts_seen, 1, {}),
    ("training.prompts_per_step", prompts_seen, 4, {}),
    (
        "training.num_train_epochs",
        lambda **training: with_epochs(recipe_of("sft", training=training), 100).training.max_steps,
        *(3, {}),
    ),
]
