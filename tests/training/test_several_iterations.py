"""Several optimizer steps on one rollout: the ratio is taken to the policy before the first of them."""

import pytest
import torch
from training_cases import (
    Heard,
    base_of,
    gradients,
    ladder_of,
    limits_of,
    logps_of,
    objective_of,
    ragged_batch,
    settings_of,
    stepper_of,
    weights,
)

from lowmem_rlhf.algorithms.grpo.entropy import EntropyCoefficient, high_entropy_tokens
from lowmem_rlhf.algorithms.grpo.update import update


def updated(lr: float = 1e-3, tokens: int = 40, **settings):
    base, batch = base_of(), ragged_batch()
    optimizer = stepper_of(base.trainable(), learning_rate=lr, lr_scheduler_type="constant")
    stats = update(base, optimizer, batch, objective_of(settings_of(**settings)), ladder_of(tokens), {}, Heard())
    return base, stats, optimizer


def test_the_first_iteration_is_on_the_policy():
    base, stats, _ = updated(lr=1.0)
    assert (stats.clipped_low, stats.clipped_high) == (0, 0)
    assert stats.clip_tokens == stats.scored == sum(len(v) for v in stats.logps.values())
    start = logps_of(base_of(), ragged_batch(), "policy")
    for row, logps in stats.logps.items():
        torch.testing.assert_close(logps, start[row])
    assert (logps_of(base, ragged_batch(), "policy")[0] - start[0]).abs().max() > 1  # the policy did move


def test_a_second_iteration_is_clipped_when_the_first_went_far():
    _, far, _ = updated(lr=0.1, num_iterations=2)
    assert far.clipped_low > 0
    assert far.clipped_high > 0
    assert far.clip_tokens == 2 * far.scored
    _, near, _ = updated(lr=1e-6, num_iterations=2)
    assert (near.clipped_low, near.clipped_high) == (0, 0)


@pytest.mark.parametrize("iterations", [2, 3])
def test_every_iteration_takes_the_log_probs_from_before_the_first(iterations):
    base, stats, optimizer = updated(lr=0.02, num_iterations=iterations)

    by_hand, batch = base_of(), ragged_batch()
    own = stepper_of(by_hand.trainable(), learning_rate=0.02, lr_scheduler_type="constant")
    first, _ = gradients(by_hand, batch, settings_of(), limits_of(40))
    norms = [own.step()]
    tokens = first.tokens
    for _ in range(iterations - 1):
        by_hand.adapters_changed()
        again, _ = gradients(by_hand, batch, settings_of(), limits_of(40), old_logps=first.logps)
        tokens += again.tokens
        norms.append(own.step())

    assert all(torch.equal(a, b) for a, b in zip(weights(base).values(), weights(by_hand).values(), strict=True))
    assert (stats.loss, stats.tokens, stats.grad_norm) == (first.loss, tokens, norms[-1])
    assert optimizer.scheduler.last_epoch == iterations


def test_every_iteration_asks_the_policy_as_it_is_for_its_entropies():
    settings = settings_of(num_iterations=2, top_entropy_quantile=0.4, entropy_coef=0.1, use_adaptive_entropy=True)
    settings.entropy_target = 10.0
    base, batch, entropy = base_of(), ragged_batch(), EntropyCoefficient(settings)
    optimizer = stepper_of(base.trainable(), learning_rate=0.02, lr_scheduler_type="constant")
    stats = update(base, optimizer, batch, objective_of(settings), ladder_of(40), {}, Heard(), entropy)

    by_hand, masks, found = base_of(), [], []
    own = stepper_of(by_hand.trainable(), learning_rate=0.02, lr_scheduler_type="constant")
    for applied in (0.0, 0.105):  # nothing before the first measurement
        masks.append(high_entropy_tokens(by_hand, batch, settings, limits_of(40)))
        given = {"old_logps": found[0].logps if found else None, "kept": masks[-1], "entropy_coef": applied}
        found.append(gradients(by_hand, batch, settings, limits_of(40), **given)[0])
        norm = own.step()
        by_hand.adapters_changed()
    assert all(torch.equal(a, b) for a, b in zip(weights(base).values(), weights(by_hand).values(), strict=True))
    assert any(not torch.equal(masks[0][row], one) for row, one in masks[1].items())
    assert (stats.grad_norm, stats.mean_entropy) == (norm, found[0].mean_entropy)
    assert (entropy.value, entropy.entropy) == (pytest.approx(0.11), found[1].mean_entropy)


def test_the_learning_rate_schedule_counts_iterations():
    base = base_of()
    optimizer = stepper_of(base.trainable(), total=4, learning_rate=1.0, lr_scheduler_type="linear")
    update(base, optimizer, ragged_batch(), objective_of(settings_of(num_iterations=3)), ladder_of(), {}, Heard())
    assert optimizer.learning_rate == pytest.approx(0.25)
