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


def test_the_learning_rate_schedule_counts_iterations():
    base = base_of()
    optimizer = stepper_of(base.trainable(), total=4, learning_rate=1.0, lr_scheduler_type="linear")
    update(base, optimizer, ragged_batch(), objective_of(settings_of(num_iterations=3)), ladder_of(), {}, Heard())
    assert optimizer.learning_rate == pytest.approx(0.25)
