"""Groups without a difference are replaced: the pure function, the turns of prompts, and whole tiny runs."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import learned, save_tiny_model, tiny_recipe

from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.report import html
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.rollout.scores import Scores
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.dynamic_sampling import sample_until_different
from lowmem_rlhf.training.evaluate import learned_from
from lowmem_rlhf.training.online import Trainer
from lowmem_rlhf.training.turns import Turns

TOLD = ("groups/sampled", "groups/set_aside", "tokens/discarded")
REWARDS = """
def apart(completions, **_):
    return [float(n) for n in range(len(completions))]

def some(prompts, completions, **_):
    return [float(n) if sum(map(ord, prompt)) % 3 else 1.0 for n, prompt in enumerate(prompts)]
"""


def examples(count: int = 9) -> list[Example]:
    return [Example(str(n), [n], {}) for n in range(count)]


def turns_of(those: list[Example], set_aside_steps: int = 0) -> Turns[Example]:
    return Turns(PromptStream(those, 3, seed=1), those, set_aside_steps)


def rollout_of(those, number: int, dull) -> Rollout:
    """Return groups of two completions, of the same reward for dull prompts; a completion's length is its prompt's."""
    totals = [float(g) if int(one.prompt) not in dull else 1.0 for one in those for g in range(2)]
    completions = [Completion([7] * (1 + int(one.prompt)), [0.0], False) for one in those for _ in range(2)]
    scores = Scores({"r": list(totals)}, totals, {"batches": float(number)})
    texts = [f"{one.prompt}/{number}" for one in those for _ in range(2)]
    return Rollout([one.prompt_ids for one in those], completions, 2, [one.prompt for one in those], texts, scores)


@pytest.mark.parametrize("batches", [1, 2, 3, 9])
@pytest.mark.parametrize("dull", [set(), {0, 1, 2, 3}, set(range(9)), {4}])
def test_the_rollout_is_whole_and_its_groups_differ_as_far_as_the_bound_allows(batches, dull):
    those, calls = examples(), []

    def sample(asked, number):
        calls.append([one.prompt for one in asked])
        return rollout_of(asked, number, dull)

    rollout, told = sample_until_different(sample, turns_of(those), 3, batches, step=0)
    flat, in_turn = (
        [prompt for call in calls for prompt in call],
        [one.prompt for one in turns_of(those).take(27, 0)],
    )
    assert flat == in_turn[: len(flat)] and len(calls) <= batches and told["groups/sampled"] == len(flat)
    assert len(rollout.prompts) == 3 and len(rollout.completions) == len(rollout.scored.total) == 6
    lively, dull_ones = [p for p in flat if int(p) not in dull], [p for p in flat if int(p) in dull]
    assert rollout.questions == (lively + dull_ones)[:3]
    assert len(calls) == batches or len(lively) == 3
    for row, text in enumerate(rollout.texts or ()):
        prompt = int(text.split("/")[0])
        assert (prompt, len(rollout.completions[row].ids)) == (rollout.prompts[row // 2][0], 1 + prompt)
    drawn = sum(2 * (1 + int(prompt)) for prompt in flat)
    assert told["tokens/discarded"] == drawn - sum(len(one.ids) for one in rollout.completions)


def test_what_functions_reported_is_of_all_that_was_sampled():
    rollout, _ = sample_until_different(lambda e, n: rollout_of(e, n, {*range(5)}), turns_of(examples()), 3, 2, step=0)
    assert 0 < rollout.scored.metrics["batches"] < 1


def test_a_prompt_that_taught_nothing_comes_back():
    those = examples(4)
    turns = turns_of(those, set_aside_steps=2)
    first = turns.take(2, step=0)
    turns.set_aside(first, step=0)
    assert turns.aside == 2
    for step in (1, 2):
        assert not {one.prompt for one in turns.take(4, step)} & {one.prompt for one in first}
    again = turns_of(those, 2)
    again.load_state(turns.state(), step=3)
    assert [one.prompt for one in again.take(8, 3)] == [one.prompt for one in turns.take(8, 3)]
    assert {one.prompt for one in turns.take(4, 3)} == {str(n) for n in range(4)}


def test_where_all_are_set_aside_they_have_their_turn_all_the_same():
    those = examples(4)
    turns = turns_of(those, set_aside_steps=50)
    turns.set_aside(those, step=0)
    assert len(turns.take(6, step=1)) == 6


def test_turns_of_a_run_without_them_are_those_of_its_stream():
    those = examples(5)
    stream, turns = PromptStream(those, 3, 1), turns_of(those)
    turns.load_state(None, step=2)
    assert turns.take(3, 2) == stream.batch(2) and turns.take(3, 3) == stream.batch(3)


def test_rewards_are_standardised_over_the_rollout_that_is_learned_from():
    """Not over the batches that it was chosen from, one of which may be a single group."""
    those = examples()
    rewards = [Reward("r", lambda **_: [], normalize="batch")]
    rollout, _ = sample_until_different(lambda e, n: rollout_of(e, n, {0, 4}), turns_of(those), 3, 5, step=0)
    learned_totals = learned_from({"": rewards}, rollout, normalize=False).scored
    raw = torch.tensor(rollout.scored.by_name["r"], dtype=torch.float64)
    wanted = (raw - raw.mean()) / (raw.std() + 1e-4)
    assert learned_totals.total == pytest.approx(wanted.tolist()) and learned_totals.raw_total == raw.tolist()
    plain = [Reward("r", lambda **_: [], weight=3.0)]
    once = learned_from({"": plain}, rollout, normalize=True).scored
    assert once.total == pytest.approx(((raw - raw.mean()) * 3 / (3 * raw.std() + 1e-4)).tolist())
    assert once.raw_total == (3 * raw).tolist()


# Whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic")
    (folder / "own.py").write_text(REWARDS)
    save_tiny_model(folder / "model")
    return folder


def run(place: Path, name: str, reward: str, steps: int = 3, resume: bool = False, **grpo: Any) -> RunDirectory:
    recipe = tiny_recipe(
        place / "model",
        rewards=[{"function": f"{place}/own.py:{reward}"}],
        grpo=grpo,
        data={"eval_size": 0},
        training={"max_steps": steps, "prompts_per_step": 3, "save_steps": 1},
    )
    return train(recipe, place / name, resume)


def test_with_a_difference_in_every_group_it_is_the_run_without_it(place, monkeypatch):
    monkeypatch.setattr(html, "write_report", lambda run: None)
    plain = learned(run(place, "plain", "apart"))
    with_it = learned(run(place, "with", "apart", max_generation_batches=4))
    for row in with_it["metrics"]:
        assert [row.pop(name) for name in TOLD] == [3, 0, 0]
    assert all((with_it["adapter"].pop(name) == one).all() for name, one in plain.pop("adapter").items())
    assert with_it.pop("adapter") == {} and with_it == plain


def test_dull_groups_are_replaced_and_a_resumed_run_is_the_uninterrupted_one(place, monkeypatch):
    monkeypatch.setattr(html, "write_report", lambda run: None)
    settings = {"max_generation_batches": 5, "set_aside_steps": 2}
    whole = learned(run(place, "whole", "some", 4, **settings))
    assert (
        sum(row["groups/sampled"] for row in whole["metrics"]) > 12 > 0 == whole["metrics"][0]["groups/without_signal"]
    )
    assert any(row["groups/set_aside"] for row in whole["metrics"])
    rollout, stop_at = Trainer._rollout, random.Random(0).choice([1, 2, 3])

    def stopped(self, progress):
        made = rollout(self, progress)
        if self.step == stop_at:  # its prompts have had their turn already
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_rollout", stopped)
        run(place, "part", "some", 4, **settings)
    again = learned(run(place, "part", "some", 4, resume=True, **settings))
    assert all((again["adapter"].pop(name) == one).all() for name, one in whole.pop("adapter").items())
    assert again.pop("adapter") == {} and again == whole
