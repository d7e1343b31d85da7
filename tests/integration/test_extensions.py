"""A loss and a rollout engine from outside of the package, each through two steps of a whole run."""

from pathlib import Path

import pytest
import torch
from tiny_runs import learned, tiny_recipe

from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.memory.rollout import ROLLOUT_BYTES
from lowmem_rlhf.report import html
from lowmem_rlhf.rollout import engine as engines
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.session.check import check_recipe
from lowmem_rlhf.session.train import train

LOSSES = '''
"""A loss as TRL has it, and one that it has not."""

import torch


def as_dapo(inputs):
    """DAPO, written out."""
    ratio = (inputs.logps - inputs.old_logps).exp()
    clipped = ratio.clamp(1 - inputs.epsilon_low, 1 + inputs.epsilon_high)
    loss = -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    if inputs.beta:
        difference = inputs.ref_logps - inputs.logps
        loss = loss + inputs.beta * (ratio * (difference.exp() - difference - 1))
    return loss * (1.0 / inputs.tokens)


def likelihood(inputs):
    """What was sampled becomes likelier, whatever its reward."""
    return -inputs.logps / inputs.tokens


def averaged(inputs):
    return -(inputs.logps * inputs.advantages) / len(inputs.logps)
'''
TRAINING = {"max_steps": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread, and no report, which is not what they test."""
    monkeypatch.setattr(html, "write_report", lambda run: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def losses(tmp_path) -> Path:
    file = tmp_path / "losses.py"
    file.write_text(LOSSES, encoding="utf-8")
    return file


@pytest.mark.parametrize("grpo", [{"beta": 0.04}, {"beta": 0.0, "num_iterations": 2, "epsilon_high": 0.28}])
def test_dapo_from_a_users_file_gives_the_bits_of_dapo(tiny_model, tmp_path, losses, grpo):
    runs = [
        train(tiny_recipe(tiny_model, grpo={**grpo, "loss_type": loss_type}, training=TRAINING), tmp_path / name)
        for name, loss_type in (("own", f"{losses}:as_dapo"), ("shipped", "dapo"))
    ]
    own, shipped = map(learned, runs)
    assert len(own["metrics"]) == 2
    for key in ("metrics", "samples", "evaluation"):
        assert own[key] == shipped[key]
    assert all(torch.equal(weight, shipped["adapter"][name]) for name, weight in own["adapter"].items())


def test_a_loss_without_advantages_trains_where_all_rewards_are_equal(tiny_model, tmp_path, losses):
    file = tmp_path / "rewards.py"
    file.write_text("def same(completions, **columns):\n    return [1.0] * len(completions)\n", encoding="utf-8")
    grpo = {"beta": 0.0, "loss_type": f"{losses}:likelihood"}
    recipe = tiny_recipe(tiny_model, grpo=grpo, rewards=[f"{file}:same"], training=TRAINING)
    rows = train(recipe, tmp_path / "run").metrics()
    assert [row["groups/without_signal"] for row in rows] == [1.0, 1.0]
    assert all(row["grad_norm"] > 0 and row["loss"] > 0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > 1e-4  # the policy has moved


def test_a_run_with_its_own_loss_goes_on_from_another_folder(tiny_model, tmp_path, losses, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(
        tiny_model, grpo={"loss_type": "losses.py:as_dapo"}, training={"max_steps": 2, "save_steps": 1}
    )
    run = train(recipe, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = train(recipe, run.path, resume=True)
    assert len(again.metrics()) == 2 and again.recipe_values()["grpo"]["loss_type"] == "losses.py:as_dapo"


def test_a_loss_that_hangs_on_the_split_is_refused_before_weights_are_loaded(tiny_model, tmp_path, losses, monkeypatch):
    monkeypatch.setattr("lowmem_rlhf.session.train.open_base", lambda *args: 1 / 0)
    recipe = tiny_recipe(tiny_model, grpo={"loss_type": f"{losses}:averaged"}, training=TRAINING)
    with pytest.raises(
        UserError, match=r"grpo\.loss_type: .*averaged gives a token another loss when its batch is cut"
    ):
        train(recipe, tmp_path / "run")
    [message] = check_recipe(recipe).errors
    assert "averaged gives a token another loss" in message
    assert not (tmp_path / "run").exists()


class FixedEngine:
    """Answers every prompt with the same tokens, whose log-probs are the policy's."""

    def __init__(self, base, dequantize):
        self.base, self.synced, self.asked = base, 0, []
        FixedEngine.last = self

    def sync(self):
        self.synced += 1

    def generate(self, prompts, num_generations, max_completion_length, sampling, limits, seed, progress=None):
        self.asked.append((len(prompts), num_generations, limits.rows, seed))
        stop = next(iter(self.base.stop_ids))
        answers = [[5 + n, 7 + n, stop] for n in range(num_generations)]
        empty = [Completion(ids, [], False) for _ in prompts for ids in answers]
        rollout = Rollout(prompts, empty, num_generations)
        limits = BatchLimits(sampling.temperature or 1.0, limits.prefill_tokens, limits.tile)
        logps = completion_logprobs(self.base, rollout.groups(range(len(empty))), limits)
        drawn = [Completion(one.ids, logps[row].tolist(), False) for row, one in enumerate(empty)]
        return [drawn[i : i + num_generations] for i in range(0, len(drawn), num_generations)]


@pytest.fixture
def registered():
    """Register the engine, for this test alone."""
    engines.register_engine("fixed", FixedEngine, lambda memory: {"kv_cache": 12_345})
    yield
    del engines.ENGINES["fixed"], ROLLOUT_BYTES["fixed"]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_an_engine_from_outside_samples_what_is_trained_on(tiny_model, tmp_path, registered, algorithm):
    recipe = tiny_recipe(
        tiny_model,
        algorithm=algorithm,
        generation={"engine": "fixed"},
        ppo={"num_ppo_epochs": 1},
        rewards=[f"{_first_token(tmp_path)}:first"],
        training=TRAINING,
    )
    run = train(recipe, tmp_path / "run")
    engine, rows = FixedEngine.last, run.metrics()
    assert engine.synced == len(engine.asked) == 4  # two steps, and the evaluation before and after
    assert [asked[:3] for asked in engine.asked] == [(4, 1, 8), (4, 4, 8), (4, 4, 8), (4, 1, 8)]
    assert [row["completion/mean_length"] for row in rows] == [3.0, 3.0]
    assert all(row["sampling/logp_difference"] < 1e-5 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert run.plan()["memory"]["phases"]["rollout"]["kv_cache"] == 12_345


def _first_token(folder: Path) -> Path:
    file = folder / "rewards.py"
    file.write_text(
        "def first(completion_ids, **columns):\n    return [float(ids[0]) for ids in completion_ids]\n",
        encoding="utf-8",
    )
    return file


def test_an_engine_that_nobody_has_registered_is_refused_before_anything_is_loaded(tiny_model, tmp_path):
    recipe = tiny_recipe(tiny_model, generation={"engine": "shared_promt"})
    with pytest.raises(UserError, match=r"generation\.engine: got 'shared_promt'; the engines are auto.*shared_prompt"):
        train(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=r"generation\.engine: own_cache is not for"):
        train(tiny_recipe(tiny_model, generation={"engine": "own_cache"}), tmp_path / "other")


def test_a_name_is_registered_once(registered):
    with pytest.raises(ValueError, match=r"engine 'auto' is there already"):
        engines.register_engine("auto", FixedEngine)
