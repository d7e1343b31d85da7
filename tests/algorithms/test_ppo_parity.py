"""PPO of TRL 1.12.0, the last release that had it: our mathematics on its recorded rollouts gives its numbers.

The recordings and the script that makes them are in tests/fixtures/trl_ppo. Differences that are ours by intent are
asserted here too: where the score sits, that an EOS counts whatever pads, and that padding takes no part in statistics.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_rlhf.algorithms.common.gae import gae
from lowmem_rlhf.algorithms.common.padded import token_mask, unpad_rows
from lowmem_rlhf.algorithms.common.shaping import reward_lengths, shape_scores, token_rewards
from lowmem_rlhf.algorithms.ppo.math import policy_loss, ppo_advantages, value_loss
from lowmem_rlhf.algorithms.ppo.stats import PPOStatistics

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "trl_ppo"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
WHITENED = [name for name in CASES if "whiten" in name]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NAN = float("nan")


def tensors(fields: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{k: torch.tensor(v) if isinstance(v, list) else v for k, v in fields.items()})


@cache
def recording(name: str) -> SimpleNamespace:
    """Return a case with tensors for its lists of numbers, and TRL's lengths as we count them."""
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    batches, rollout, stats = (raw.pop(k) for k in ("batches", "rollout", "stats"))
    case = tensors(raw)
    case.batches = [tensors(batch) for batch in batches]
    case.rollout, case.stats = tensors(rollout), {k: torch.tensor(v) for k, v in stats.items()}
    case.lengths = case.rollout.sequence_lengths + 1
    case.width = case.rollout.logprobs.shape[1]
    case.mask = token_mask(case.lengths, case.width)
    case.value_lengths = reward_lengths(case.lengths, case.width, "after_last")
    case.value_mask = token_mask(case.value_lengths, case.width)
    return case


def advantages_of(case: SimpleNamespace, **changes: Any):
    """Return what we make of TRL's rollout, which has NaN where no function of ours may look."""
    chosen = ("kl_coef", "kl_estimator", "gamma", "lam", "whiten_rewards")
    settings = {"score_position": "after_last", **{k: case.settings[k] for k in chosen}, **changes}
    rollout = case.rollout
    return ppo_advantages(
        rollout.logprobs.where(case.mask, NAN),
        rollout.ref_logprobs.where(case.mask, NAN),
        rollout.values.where(case.value_mask, NAN),
        rollout.scores,
        case.lengths,
        **settings,
    )


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_scores(name):
    case = recording(name)
    penalty = case.settings["missing_eos_penalty"]
    close(shape_scores(case.raw_scores, ~case.rollout.contain_eos, missing_eos_penalty=penalty), case.rollout.scores)
    assert (not torch.equal(case.raw_scores, case.rollout.scores)) == (penalty is not None)


@pytest.mark.parametrize("name", CASES)
def test_rewards_advantages_and_returns(name):
    case = recording(name)
    ours = advantages_of(case)
    close(ours.kl, case.rollout.kl)
    close(ours.rewards, case.rollout.rewards)
    close(ours.advantages, case.rollout.advantages)
    close(ours.returns, case.rollout.returns)
    assert torch.equal(ours.value_lengths, case.value_lengths)


@pytest.mark.parametrize("name", CASES)
def test_steps_between(name):
    case = recording(name)
    rewards = token_rewards(case.rollout.kl, case.rollout.scores, case.lengths, case.settings["kl_coef"], "after_last")
    before = case.rewards_before_whitening[0] if name in WHITENED else case.rollout.rewards
    close(rewards, before)
    assert len(case.rewards_before_whitening) == (name in WHITENED)
    settings = [case.settings[k] for k in ("gamma", "lam")]
    raw, _ = gae(case.rollout.rewards, case.rollout.values, case.value_lengths, *settings)
    close(raw, case.advantages_before_whitening)
    assert not torch.allclose(raw, case.rollout.advantages, atol=0.01)  # so that the whitening is seen to happen


@pytest.mark.parametrize("name", CASES)
def test_by_default_the_score_is_on_the_last_token_itself(name):
    case = recording(name)
    kept, theirs = (advantages_of(case, score_position=p, whiten_rewards=False) for p in ("last", "after_last"))
    moved = (case.lengths < case.width).nonzero().flatten()
    full = (case.lengths == case.width).nonzero().flatten()
    torch.testing.assert_close(kept.rewards[full], theirs.rewards[full])
    for row in moved.tolist():
        end, score = case.lengths[row] - 1, case.rollout.scores[row]
        assert kept.rewards[row, end] == theirs.rewards[row, end] + score
        assert (kept.rewards[row, end + 1], theirs.rewards[row, end + 1]) == (0, score)
    assert (len(moved) == 0) == (name == "no_stop_token")
    assert torch.equal(kept.value_lengths, case.lengths)


def test_where_pad_is_eos_trls_place_is_the_eos_itself():
    """TRL's lengths leave the EOS out then: it is neither penalised nor learned. Ours count it."""
    case = recording("pad_is_eos")
    ended = case.rollout.contain_eos
    assert 2 < ended.sum() < len(ended)
    lengths = case.lengths + ended
    chosen = {k: case.settings[k] for k in ("kl_coef", "kl_estimator", "gamma", "lam")}
    rollout = case.rollout  # its log-probs are both 1 where TRL saw padding, so that the EOS has no divergence
    ours = ppo_advantages(rollout.logprobs, rollout.ref_logprobs, rollout.values, rollout.scores, lengths, **chosen)
    close(ours.rewards, rollout.rewards)
    close(ours.returns, rollout.returns)
    rows = ended.nonzero().flatten()
    assert (ours.rewards[rows, lengths[rows] - 1] == rollout.scores[rows]).all()
    assert (rollout.advantages[rows, lengths[rows] - 1] == 0).all()
    assert (ours.advantages[rows, lengths[rows] - 1] != 0).all()


def losses_of(case: SimpleNamespace, batch: SimpleNamespace):
    """Return loss, gradients (rows, L) and statistics of a recorded batch, over its real tokens alone."""
    rows, settings, rollout = batch.rows, case.settings, case.rollout
    mask, value_mask = case.mask[rows], case.value_mask[rows]
    logps = batch.new_logprobs.clone().requires_grad_()
    values = batch.vpred.clone().requires_grad_()
    policy = policy_loss(
        logps[mask], rollout.logprobs[rows][mask], rollout.advantages[rows][mask], settings["cliprange"]
    )
    value = value_loss(
        values[value_mask],
        rollout.values[rows][value_mask],
        rollout.returns[rows][value_mask],
        settings["cliprange_value"],
    )
    loss = policy.loss.sum() / mask.sum() + settings["vf_coef"] * value.loss.sum() / value_mask.sum()
    loss.backward()
    stats = PPOStatistics()
    stats.add(policy, value)
    return loss.item(), logps.grad, values.grad, stats


@pytest.mark.parametrize("name", CASES)
def test_losses_and_their_gradients(name):
    case = recording(name)
    for batch in case.batches:
        loss, logps_grad, values_grad, stats = losses_of(case, batch)
        metrics = stats.metrics()
        assert loss == pytest.approx(batch.loss, abs=1e-5)
        assert metrics["policy/loss"] == pytest.approx(batch.pg_loss, abs=1e-5)
        assert metrics["value/loss"] == pytest.approx(batch.vf_loss, rel=1e-5)
        steps = case.settings["gradient_accumulation_steps"]  # accelerate divides the loss by it
        close(logps_grad / steps, batch.grad_new_logprobs)
        close(values_grad / steps, batch.grad_vpred)
        assert batch.grad_new_logprobs.abs().max() > 1e-3
        assert batch.grad_vpred.abs().max() > 1e-4


def statistics_of(case: SimpleNamespace) -> dict[str, torch.Tensor]:
    """Return our statistics of every recorded batch in tables as TRL has: (epochs, mini-batches, micro-batches)."""
    tables = {key: torch.zeros_like(table) for key, table in case.stats.items() if key != "entropy_stats"}
    for batch in case.batches:
        *_, stats = losses_of(case, batch)
        metrics = stats.metrics()
        share = stats.tokens / batch.new_logprobs.numel()  # TRL's ratio and approx_kl count the padding too, as 1 and 0
        cells = {
            "pg_loss_stats": metrics["policy/loss"],
            "vf_loss_stats": metrics["value/loss"],
            "pg_clipfrac_stats": metrics["policy/clip_fraction"],
            "vf_clipfrac_stats": metrics["value/clip_fraction"],
            "approxkl_stats": metrics["policy/approx_kl"] * share,
            "ratio_stats": metrics["policy/ratio_mean"] * share + 1 - share,
        }
        for key, table in tables.items():
            table[tuple(batch.place.tolist())] = cells[key]
    return tables


@pytest.mark.parametrize("name", CASES)
def test_statistics_of_every_batch(name):
    case = recording(name)
    ours = statistics_of(case)
    assert len(ours) == 6
    for key, table in ours.items():
        close(table, case.stats[key])
    # TRL leaves cells of its tables empty where a mini-batch has fewer micro-batches than the accumulation has steps
    assert (ours["ratio_stats"] == 0).any() == (name == "mini_batches")


@pytest.mark.parametrize("name", CASES)
def test_logged_statistics(name):
    case = recording(name)
    ours, scores, means = advantages_of(case), case.rollout.scores.mean(), statistics_of(case)
    kl = ours.kl.sum(1).mean()
    logged = {
        "objective/kl": kl,
        "objective/non_score_reward": -case.settings["kl_coef"] * kl,
        "objective/scores": scores,
        "objective/rlhf_reward": scores - case.settings["kl_coef"] * kl,
        "objective/entropy": -torch.stack([x.sum() for x in unpad_rows(case.rollout.logprobs, case.lengths)]).mean(),
        "loss/policy_avg": means["pg_loss_stats"].mean(),
        "loss/value_avg": means["vf_loss_stats"].mean(),
        "policy/approxkl_avg": means["approxkl_stats"].mean(),
        "policy/clipfrac_avg": means["pg_clipfrac_stats"].mean(),
        "val/clipfrac_avg": means["vf_clipfrac_stats"].mean(),
        "val/ratio": means["ratio_stats"].mean(),
        "val/ratio_var": means["ratio_stats"].var(),
    }
    untested = {"policy/entropy_avg", "val/num_eos_tokens"}  # of the logits, and of the tokens: nothing of ours
    assert case.logged.keys() - logged.keys() == untested
    for key, value in logged.items():
        assert float(value) == pytest.approx(case.logged[key], rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_is_on_the_policy_and_later_ones_are_clipped(name):
    case = recording(name)
    first = losses_of(case, case.batches[0])[-1].metrics()
    assert first["policy/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert max(first["policy/ratio_max"] - 1, 1 - first["policy/ratio_min"]) < 1e-5
    assert first["policy/approx_kl"] < 1e-10
    assert abs(first["policy/approx_kl_k3"]) < 1e-6
    assert first["policy/clip_fraction"] == first["value/clip_fraction"] == 0
    last = losses_of(case, case.batches[-1])[-1].metrics()
    assert last["policy/clip_fraction"] > 0.1
    assert last["value/clip_fraction"] > 0.1
    assert last["policy/approx_kl_k3"] == pytest.approx(last["policy/approx_kl"], rel=0.5)


def recorder():
    spec = importlib.util.spec_from_file_location("trl_ppo_record", FOLDER / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recordings_are_those_of_the_script():
    module = recorder()
    assert set(CASES) == module.CASES.keys()
    for name in CASES:
        case = recording(name)
        assert case.settings == {**module.BASE, **module.CASES[name]}
        assert "trl==" + case.versions["trl"] == module.TRL
    ragged = [name for name in CASES if recording(name).lengths.unique().numel() > 2]
    assert set(CASES) - set(ragged) == {"no_stop_token", "mini_batches"}
