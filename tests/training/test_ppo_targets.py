"""What PPO, RLOO and REINFORCE++ make of a scored rollout: TRL's targets of TRL's rollouts, ours by hand elsewhere."""

import sys
from pathlib import Path

import pytest
import torch
from ppo_cases import rows_of

from lowmem_rlhf.algorithms.common.padded import unpad_rows
from lowmem_rlhf.algorithms.ppo.policy_gradient import CriticValues, ScoredRollout
from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.rollout.rollout import Completion, Rollout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "algorithms"))
from test_ppo_parity import CASES, recording


def ppo_of(algorithm, settings, generations=1, length=10):
    """Return the algorithm of a recipe with these settings."""
    values = {"model": "none", "algorithm": algorithm, "data": {"train": "arithmetic"}, "rewards": ["length"]}
    generation = {"num_generations": generations, "max_completion_length": length}
    recipe = validate_recipe({**values, "generation": generation, "ppo": settings})
    return resolve(recipe.spec.learner)(recipe)


def answers_of(lengths, cut=(), generations=1):
    """Return the batch of completions of these lengths; rows in ``cut`` did not end."""
    completions = [Completion([5] * n, [0.0] * n, row in cut) for row, n in enumerate(lengths)]
    return Rollout([[7]] * (len(lengths) // generations), completions, generations)


def targets_of(algorithm, rollout, rows, logps, refs, scores, values=None, bootstrap=None):
    """Return what an algorithm makes of a rollout that has been scored so, and what it measures."""
    critic = CriticValues(values or {}, bootstrap or {})
    estimator = algorithm.settings.kl_estimator
    return algorithm.penalized(ScoredRollout(rollout, list(rows), logps, refs, scores, estimator, critic))


# TRL's recorded rollouts


def targets_from(case, rows):
    """Return what PPO makes of a recorded rollout's rows."""
    chosen = ("kl_coef", "kl_estimator", "gamma", "lam", "whiten_rewards")
    settings = {"score_position": "after_last", **{k: case.settings[k] for k in chosen}}
    rollout, lengths = case.rollout, case.lengths[rows]
    logps, refs = (dict(enumerate(unpad_rows(x[rows], lengths))) for x in (rollout.logprobs, rollout.ref_logprobs))
    # the critic is asked behind every last token, also where TRL's rows have no room for it
    wide = torch.nn.functional.pad(rollout.values[rows], (0, 1))
    values = dict(enumerate(unpad_rows(wide, lengths + 1)))
    beyond = {row: value[-1] for row, value in values.items()}
    batch = answers_of(lengths.tolist())
    algorithm = ppo_of("ppo", settings, length=case.width)
    return targets_of(algorithm, batch, range(len(rows)), logps, refs, rollout.scores[rows], values, beyond)


@pytest.mark.parametrize("name", CASES)
def test_trls_rollout_gives_trls_targets(name):
    case = recording(name)
    rows = range(len(case.lengths))
    made, metrics = targets_from(case, list(rows))
    for row in rows:
        n, m = int(case.lengths[row]), int(case.value_lengths[row])
        torch.testing.assert_close(made.advantages[row], case.rollout.advantages[row, :n], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.returns[row], case.rollout.returns[row, :m], rtol=1e-5, atol=1e-5)
        assert torch.equal(made.old_values[row], case.rollout.values[row, :m])
    assert made.bootstrap_position
    for key in ("objective/kl", "objective/non_score_reward", "objective/scores", "objective/rlhf_reward"):
        assert metrics[key] == pytest.approx(case.logged[key], rel=1e-4, abs=1e-6), key


def test_the_place_after_the_last_token_does_not_hang_on_the_longest_answer():
    """TRL's rows are as wide as an answer may be; so the score of the batch's longest has its slot as well."""
    case = recording("default")
    short = (case.lengths < case.width).nonzero().flatten().tolist()
    assert len(short) > 3
    made, _ = targets_from(case, short)
    for i, row in enumerate(short):
        n = int(case.lengths[row])
        assert len(made.returns[i]) == len(made.old_values[i]) == n + 1
        assert len(made.advantages[i]) == n
        torch.testing.assert_close(made.returns[i], case.rollout.returns[row, : n + 1], rtol=1e-5, atol=1e-5)


# What completions without a reward leave behind


def test_a_completion_without_a_reward_makes_its_group_smaller():
    settings = {"kl_coef": 0.1}
    batch = answers_of((2, 3, 1, 4, 2, 2, 3, 1, 2), generations=3)
    rows = [0, 1, 2, 3, 5, 7]  # of the groups all, two and one
    scores = torch.tensor([1.0, 0.5, -0.25, 2.0, 0.0, 3.0])
    lengths = [len(batch.completions[row].ids) for row in rows]
    logps = dict(zip(rows, rows_of(lengths, 1).values(), strict=True))
    refs = dict(zip(rows, rows_of(lengths, 2).values(), strict=True))
    kl = {row: logps[row] - refs[row] for row in rows}
    answers = {row: float(score - 0.1 * kl[row].sum()) for row, score in zip(rows, scores, strict=True)}

    def others(row):
        return [answers[other] for other in rows if other // 3 == row // 3 and other != row]

    made, metrics = targets_of(ppo_of("rloo", settings, 3), batch, rows, logps, refs, scores)
    for row in rows:
        want = answers[row] - sum(others(row)) / len(others(row)) if others(row) else 0.0
        assert made.advantages[row].tolist() == pytest.approx([want], abs=1e-5)
    assert made.by_sequence and sorted(made.advantages) == rows
    assert metrics["kl"] == pytest.approx(float(torch.cat(list(kl.values())).mean()), abs=1e-6)
    assert metrics["objective/kl"] == pytest.approx(sum(float(k.sum()) for k in kl.values()) / len(rows), abs=1e-6)

    baseline = ppo_of("reinforce_plus_plus", {**settings, "group_baseline": True}, 3)
    made, _ = targets_of(baseline, batch, rows, logps, refs, scores)
    means = {0: (1 + 0.5 - 0.25) / 3, 1: 1.0, 2: 3.0}
    following = {}
    for row, score in zip(rows, scores.tolist(), strict=True):
        rewards = -0.1 * kl[row]
        rewards[-1] += score - means[row // 3]
        following[row] = rewards.flip(0).cumsum(0).flip(0)
    every = torch.cat(list(following.values()))
    for row in rows:
        want = (following[row] - every.mean()) / (every.var() + 1e-8).sqrt()
        torch.testing.assert_close(made.advantages[row], want, rtol=1e-5, atol=1e-5)


def test_an_answer_that_was_cut_is_worth_what_the_critic_expects_from_there():
    batch = answers_of((2, 2), cut=(1,))
    logps = {0: torch.zeros(2), 1: torch.zeros(2)}
    values = {0: torch.tensor([0.5, 0.25]), 1: torch.tensor([0.5, 0.25])}
    beyond = {0: torch.tensor(7.0), 1: torch.tensor(7.0)}
    scores = torch.tensor([1.0, 1.0])
    ppo = ppo_of("ppo", {"bootstrap_truncated": True, "lam": 1.0, "gamma": 0.5})
    made, _ = targets_of(ppo, batch, [0, 1], logps, logps, scores, values, beyond)
    assert made.returns[0].tolist() == [0.5, 1.0]
    assert made.returns[1].tolist() == [0.25 * 7 + 0.5, 0.5 * 7 + 1.0]


def test_the_coefficient_adapts_after_it_was_used():
    batch = answers_of((2, 2))
    logps, refs = ({0: torch.full((2,), v), 1: torch.full((2,), v)} for v in (-1.0, -3.0))
    ppo = ppo_of("reinforce_plus_plus", {"kl_coef": 0.1, "kl_target": 2.0, "kl_horizon": 10})
    _, metrics = targets_of(ppo, batch, [0, 1], logps, refs, torch.tensor([1.0, 0.0]))
    assert metrics["objective/kl"] == 4.0
    assert metrics["objective/kl_coef"] == 0.1
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.4)
    assert ppo.kl.value == pytest.approx(0.1 * (1 + 0.2 * 2 / 10))
