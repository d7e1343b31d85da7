"""However a batch is cut into micro-batches and tiles, its loss and gradient are those of the whole batch."""

import pytest
import torch
from training_cases import (
    ADVANTAGES,
    BETAS,
    CPU,
    LOSS_TYPES,
    base_of,
    close,
    drawn_with,
    gradients,
    limits_of,
    logps_of,
    objective_of,
    ragged_batch,
    settings_of,
    shifted,
)

from lowmem_rlhf.algorithms.grpo import update
from lowmem_rlhf.algorithms.grpo.entropy import high_entropy_tokens
from lowmem_rlhf.algorithms.grpo.update import rows_to_train
from lowmem_rlhf.engine.packing import split_groups

TOLERANCE = 1e-5
PROMPTS = (5, 2, 9, 5, 30)


@pytest.fixture(scope="module")
def base():
    return base_of()


@pytest.fixture(scope="module")
def batch():
    return ragged_batch([*ADVANTAGES, 0.4, 0.0, -0.4, 0.0, 0.0, 0.0, 0.0, 0.0], prompts=PROMPTS)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_any_split_gives_the_whole_batches_gradient(base, batch, loss_type, beta):
    settings = settings_of(loss_type=loss_type, beta=beta, mask_truncated_completions=loss_type == "bnpo")
    logps = {"ref": logps_of(base, batch, "reference"), "old_logps": shifted(logps_of(base, batch, "policy"))}
    whole, want = gradients(base, batch, settings, limits_of(1_000_000), **dict(logps))
    groups = batch.groups(rows_to_train(batch, objective_of(settings)))
    counts = set()
    for tokens, tile in [(1, 1), (9, 1000), (17, 7), (40, 3), (90, 64)]:
        counts.add(len(split_groups(groups, tokens)))
        stats, got = gradients(base, batch, settings, limits_of(tokens, tile), **dict(logps))
        assert stats.loss == pytest.approx(whole.loss, rel=TOLERANCE, abs=1e-6)  # terms of size 1 that nearly cancel
        assert (stats.kl_tokens, stats.scored) == (whole.kl_tokens, whole.scored)
        assert stats.entropy == pytest.approx(whole.entropy, rel=TOLERANCE)
        assert stats.kl == pytest.approx(whole.kl, rel=1e-4)
        assert (stats.clipped_low, stats.clipped_high) == (whole.clipped_low, whole.clipped_high)
        for name, gradient in got.items():
            assert want[name].norm() > 0, name
            assert close(gradient, want[name]) < TOLERANCE, (name, tokens)
    assert len(counts) >= 4  # the splits differ, from one completion a micro-batch on
    assert max(counts) == len(rows_to_train(batch, objective_of(settings)))


NARROW = {"epsilon": 0.03, "epsilon_high": 0.05, "importance_sampling_level": "sequence"}
OTHERS = [
    {**NARROW, "loss_type": "grpo", "beta": 0.04},
    {**NARROW, "loss_type": "luspo", "delta": 1.06},
    {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.04, "mask_truncated_completions": True},
    {"loss_type": "sapo"},
    {"loss_type": "vespo", "off_policy_mask_threshold": 0.02},
]


@pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: changes["loss_type"])
def test_any_split_gives_the_same_gradient_of_every_other_loss(base, batch, changes):
    policy, settings = logps_of(base, batch, "policy"), settings_of(**changes)
    drawn = drawn_with(batch, shifted(policy, by=0.3, seed=11))
    logps = {"ref": logps_of(base, batch, "reference"), "old_logps": shifted(policy)}
    whole, want = gradients(base, drawn, settings, limits_of(1_000_000), **dict(logps))
    for tokens, tile in [(1, 1), (17, 7), (90, 64)]:
        stats, got = gradients(base, drawn, settings, limits_of(tokens, tile), **dict(logps))
        assert stats.loss == pytest.approx(whole.loss, rel=TOLERANCE, abs=1e-6)
        for name in ("clipped_low", "clipped_high", "phi_seq", "left_out"):
            assert getattr(stats, name) == pytest.approx(getattr(whole, name), rel=TOLERANCE)
        for name, gradient in got.items():
            assert close(gradient, want[name]) < TOLERANCE, (name, tokens)


def test_any_split_gives_the_same_tokens_of_high_entropy_and_the_same_bonus(base, batch):
    settings = settings_of(loss_type="grpo", top_entropy_quantile=0.4, entropy_coef=0.2)
    kept = high_entropy_tokens(base, batch, settings, limits_of(1_000_000))
    share = torch.cat(list(kept.values())).double().mean()
    assert share == pytest.approx(0.4, abs=0.01) and len(kept) == len(batch.completions)
    whole, want = gradients(base, batch, settings, limits_of(1_000_000), kept=kept, entropy_coef=0.2)
    assert whole.mean_entropy > whole.entropy / whole.scored + 0.01
    assert whole.loss == pytest.approx(whole.policy_loss - 0.2 * whole.mean_entropy, rel=TOLERANCE)
    assert len(whole.logps) == len(batch.completions)  # those without an advantage have an entropy
    for tokens, tile in [(1, 1), (17, 7), (90, 64)]:
        again = high_entropy_tokens(base, batch, settings, limits_of(tokens, tile))
        assert all(torch.equal(again[row], one) for row, one in kept.items())
        stats, got = gradients(base, batch, settings, limits_of(tokens, tile), kept=again, entropy_coef=0.2)
        for name in ("loss", "policy_loss", "mean_entropy", "left_out"):
            assert getattr(stats, name) == pytest.approx(getattr(whole, name), rel=TOLERANCE, abs=1e-6)
        for name, gradient in got.items():
            assert close(gradient, want[name]) < TOLERANCE, (name, tokens)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_any_split_gives_the_same_corrected_gradient(base, batch, mode):
    policy = logps_of(base, batch, "policy")
    drawn = drawn_with(batch, shifted(policy, by=0.4, seed=11))
    settings = settings_of(
        beta=0.04,
        importance_sampling_correction=True,
        importance_sampling_mode=mode,
        importance_sampling_clip_max=1.25,
    )
    logps = {"ref": logps_of(base, batch, "reference"), "old_logps": shifted(policy)}
    whole, want = gradients(base, drawn, settings, limits_of(1_000_000), **dict(logps))
    for tokens, tile in [(1, 1), (17, 7), (90, 64)]:
        stats, got = gradients(base, drawn, settings, limits_of(tokens, tile), **dict(logps))
        assert stats.loss == pytest.approx(whole.loss, rel=TOLERANCE, abs=1e-6)
        for name, gradient in got.items():
            assert close(gradient, want[name]) < TOLERANCE, (name, tokens)


def test_a_correction_of_equal_log_probs_changes_nothing(base, batch):
    drawn = drawn_with(batch, logps_of(base, batch, "policy"))
    _, plain = gradients(base, drawn, settings_of(), limits_of())
    _, corrected = gradients(base, drawn, settings_of(importance_sampling_correction=True), limits_of())
    for name, gradient in corrected.items():
        assert close(gradient, plain[name]) < TOLERANCE, name


@pytest.mark.parametrize("changes", [{"loss_type": name} for name in LOSS_TYPES] + OTHERS, ids=lambda c: c["loss_type"])
def test_leaving_out_completions_without_advantage_is_exact(base, batch, changes, monkeypatch):
    settings = settings_of(**{**changes, "beta": 0.0, "mask_truncated_completions": False})
    skipped, got = gradients(base, batch, settings, limits_of())
    monkeypatch.setattr(update, "rows_to_train", lambda batch, settings: list(range(len(batch.completions))))
    full, want = gradients(base, batch, settings, limits_of())
    assert skipped.tokens < full.tokens - 30  # the last prompt is not run at all
    assert len(skipped.logps) == len(batch.completions) - 9
    assert skipped.loss == pytest.approx(full.loss, rel=TOLERANCE, abs=1e-6)
    for name, gradient in got.items():
        assert close(gradient, want[name]) < TOLERANCE, name


def test_which_completions_are_trained(batch):
    without = [2, 5, 10, 13, 15, 16, 17, 18, 19]
    rows = list(range(20))
    assert rows_to_train(batch, objective_of(settings_of(beta=0.04))) == rows
    assert rows_to_train(batch, objective_of(settings_of())) == [n for n in rows if n not in without]
    masked = settings_of(beta=0.04, mask_truncated_completions=True)
    assert rows_to_train(batch, objective_of(masked)) == [n for n in rows if n not in (4, 9)]


def test_gradients_add_up_over_calls_and_scale_with_the_loss_scale(base, batch):
    settings = settings_of()
    _, once = gradients(base, batch, settings, limits_of())
    _, scaled = gradients(base, batch, settings, limits_of(), loss_scale=4096.0)
    with base.role("policy"):
        update.backward(base, batch, objective_of(settings, 12), limits_of(), {})
    for name, parameter in base.trainable().items():
        torch.testing.assert_close(scaled[name], once[name] * 4096)
        assert close(parameter.grad, once[name] * 4097) < TOLERANCE


def test_a_batch_without_any_signal_has_no_gradient(base):
    batch = ragged_batch([0.0] * 12)
    stats, got = gradients(base, batch, settings_of(), limits_of())
    assert (stats.loss, stats.scored, stats.tokens, stats.logps) == (0.0, 0, 0, {})
    assert all(not g.any() for g in got.values())


def test_bfloat16_splits_agree_as_far_as_bfloat16_does(batch):
    base = base_of(dtype=torch.bfloat16)
    assert base.device == CPU
    _, want = gradients(base, batch, settings_of(), limits_of())
    _, got = gradients(base, batch, settings_of(), limits_of(9, 3))
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        assert close(gradient, want[name]) < 0.05, name
