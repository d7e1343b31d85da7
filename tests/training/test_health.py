"""The watch over a run's metrics: each sign of a collapse is said once, and runs that learn say nothing."""

import json

import pytest
from tiny_runs import at_rate
from training_cases import recipe_of, train, trainer_of

from lowmem_rlhf.training.health import SERIOUS_STEPS, WASTED_STEPS, HealthWatch

VOCABULARY = 49152  # its logarithm is 10.8
FINE = {
    "kl": 0.02,
    "entropy": 0.8,
    "loss": 0.01,
    "grad_norm": 0.5,
    "learning_rate": 3e-4,
    "reward/mean": 0.3,
    "completion/mean_length": 40.0,
    "completion/truncated": 0.1,
    "completion/most_common": 0.05,
    "groups/without_signal": 0.4,
}
SUPERVISED = {"loss": 1.9, "entropy": 1.7, "grad_norm": 2.0, "learning_rate": 3e-4}
# sign -> what a step shows then, and what is said of it
SERIOUS = {
    "kl": ({"kl": 7.5}, "KL divergence from the reference is 7.5 nats a token"),
    "entropy low": ({"entropy": 1e-5}, "entropy is 1e-05 nats a token, so it samples one text only"),
    "entropy high": ({"entropy": 10.5}, "entropy is 10.5 nats a token, near that of random tokens"),
    "short": ({"completion/mean_length": 1.0}, "completions have 1 tokens, so nearly all are empty"),
    "truncated": ({"completion/truncated": 1.0}, "all completions are cut at generation.max_completion_length"),
    "same text": ({"completion/most_common": 0.97}, "97 % of the completions are the same text, whatever the prompt"),
}
WASTED = {
    "clipped": ({"grad_norm": 400.0}, "gradient's norm is 400, over 100 times training.max_grad_norm"),
    "no gradient": ({"grad_norm": 0.0}, "the gradient was exactly 0"),
    "no signal": (
        {"groups/without_signal": 1.0, "reward/mean": 0.0, "grad_norm": 0.0},
        "completions had equal rewards",
    ),
}


def watch():
    return HealthWatch(VOCABULARY, max_grad_norm=1.0)


def observed(health, rows, first=1):
    """Return what was said at each step."""
    return [health.observe({"step": step, **row}) for step, row in enumerate(rows, first)]


@pytest.mark.parametrize("sign", SERIOUS)
def test_a_serious_sign_is_said_once_until_it_is_gone(sign):
    row, said = SERIOUS[sign]
    bad, health = {**FINE, **row}, watch()
    before = observed(health, [FINE] * 4 + [bad] * (SERIOUS_STEPS - 1))
    assert not any(before) and health.healthy and not health.summary()
    ((sentence,), *later) = observed(health, [bad] * 5, 4 + SERIOUS_STEPS)
    assert not any(later) and not health.healthy and health.first_serious == 5
    assert sentence.startswith(f"steps 5 to {4 + SERIOUS_STEPS}: ") and said in sentence
    assert "training.learning_rate (it was 0.0003)" in sentence or "learning_rate" in sentence
    assert "not healthy from step 5 on" in health.summary() and said in health.summary()
    observed(health, [FINE] * SERIOUS_STEPS, 20)
    assert not health.healthy and "not healthy from step 5 on" in health.summary() and said not in health.summary()
    again = observed(health, [bad] * SERIOUS_STEPS, 30)
    assert len(again[-1]) == 1 and health.first_serious == 5


@pytest.mark.parametrize("sign", SERIOUS)
def test_one_odd_step_says_nothing(sign):
    bad = {**FINE, **SERIOUS[sign][0]}
    assert not any(observed(watch(), [FINE, bad, FINE, FINE, bad, FINE] * 5))


@pytest.mark.parametrize("sign", WASTED)
def test_steps_that_teach_little_are_said_and_leave_the_run_healthy(sign):
    row, said = WASTED[sign]
    health = watch()
    sentences = observed(health, [FINE] + [{**FINE, **row}] * 2 * WASTED_STEPS)
    (only,) = [sentence for one in sentences for sentence in one]
    assert said in only and health.healthy
    assert health.summary().startswith("the run ends with steps that taught little: steps ")


def test_ten_of_twelve_steps_without_a_correct_completion_are_said():
    nothing = {**FINE, **WASTED["no signal"][0]}
    rows = [nothing, nothing, FINE, nothing, nothing, nothing, nothing, FINE, *[nothing] * 4]
    said = [sentence for one in observed(watch(), rows) for sentence in one]
    assert len(said) == 1 and "in nearly all groups" in said[0] and "take easier prompts" in said[0]


def test_what_was_so_from_the_beginning_is_no_collapse():
    for row in ({"completion/truncated": 1.0}, {"completion/mean_length": 1.0}, {"completion/most_common": 0.99}):
        assert not any(observed(watch(), [{**FINE, **row}] * 30))
    assert not any(observed(watch(), [{**FINE, "entropy": 10.6}] * 30))  # a random model


def test_a_supervised_loss_that_explodes_is_serious_and_one_that_falls_is_not():
    health = watch()
    falls = [{**SUPERVISED, "loss": 1.9 / (1 + n), "entropy": 1e-4} for n in range(20)]
    assert not any(observed(health, falls))
    said = observed(health, [{**SUPERVISED, "loss": 55.0}] * SERIOUS_STEPS, 21)[-1]
    assert len(said) == 1 and "the loss is 55, far above that of the first steps" in said[0] and not health.healthy


def test_numbers_that_are_missing_say_nothing():
    empty = dict.fromkeys(FINE) | {"kl": float("nan")}
    assert not any(observed(watch(), [empty] * 30))
    assert not any(observed(watch(), [{}] * 30))


def test_a_checkpoint_keeps_what_was_seen():
    bad = {**FINE, "kl": 9.0}
    rows = [FINE] * 3 + [bad] * 2 + [bad] * 4
    whole, half, resumed = watch(), watch(), watch()
    wanted = observed(whole, rows)
    assert observed(half, rows[:5]) == wanted[:5]
    resumed.load_state(json.loads(json.dumps(half.state())))
    assert observed(resumed, rows[5:], 6) == wanted[5:] and any(wanted[5:])
    assert resumed.state() == whole.state() and resumed.summary() == whole.summary()
    fresh = watch()
    fresh.load_state({})
    assert fresh.healthy and fresh.state() == watch().state()


def test_a_learning_rate_that_ruins_a_policy_is_named_in_the_last_sentence(model_folder, tmp_path):
    training = {"lr_scheduler_type": "constant", "max_steps": 5}
    trainer = trainer_of(recipe_of(model_folder, training=training, data={"eval_size": 0}), tmp_path / "run")
    at_rate(trainer.optimizer, 1000.0)
    _, said = train(trainer)
    assert not trainer.health.healthy and trainer.health.first_serious == 3
    assert said[-1].startswith("the run was not healthy from step 3 on") and "(it was 1000)" in said[-1]
    assert len(set(said)) == len(said)


def test_a_run_that_learns_says_nothing(model_folder, tmp_path):
    trainer = trainer_of(recipe_of(model_folder, training={"max_steps": 12}), tmp_path / "run")
    _, said = train(trainer)
    assert [line.partition(":")[0] for line in said] == ["before training"] and trainer.health.healthy
    resumed = trainer_of(trainer.recipe, tmp_path / "run", resume=True)
    assert resumed.health.state() == trainer.health.state()
