"""Whole runs of the loop on a tiny random model: what is written, what a resume continues, what stops a run."""

import itertools
import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file
from training_cases import SYMBOLS, digits, recipe_of, train, trainer_of

from lowmem_rlhf.algorithms.grpo import trainer as grpo
from lowmem_rlhf.algorithms.grpo import update as update_module
from lowmem_rlhf.engine.decode import fast_decoder
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.rollout.shared_prompt import SharedPromptEngine
from lowmem_rlhf.training import online
from lowmem_rlhf.training.metrics import Seen
from lowmem_rlhf.training.optimizer import Optimizer

CONTRACT = [
    "step",
    "reward/mean",
    "reward/std",
    "reward/digits",
    "kl",
    "entropy",
    "completion/mean_length",
    "completion/truncated",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens/generated",
    "tokens/trained",
    "time/step",
    "time/rollout",
    "time/score",
    "time/update",
    "memory/peak_bytes",
    "sampling/logp_difference",
]


def adapter(run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def learned(run) -> list[dict]:
    """The metrics less what a machine's speed and memory decide."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in run.metrics()]


class Failing:
    """The reward of these runs, failing at a call; calls count the evaluation before training as 0."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.calls = at, error, -1

    def __call__(self, completions, **columns):
        self.calls += 1
        if self.calls == self.at and isinstance(self.error, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if self.calls == self.at:
            raise self.error
        return digits(completions)


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """A run of four steps that nothing interrupted."""
    trainer = trainer_of(recipe_of(model_folder), tmp_path_factory.mktemp("runs") / "whole")
    evaluation, _ = train(trainer)
    return trainer.run, evaluation


def test_every_step_writes_every_metric_and_all_are_finite(whole):
    rows = whole[0].metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert not [key for key in CONTRACT if key not in row]
        assert not {key: value for key, value in row.items() if not math.isfinite(value)}
        assert row["grad_norm"] > 0
        assert 0 < row["entropy"] < math.log(len(SYMBOLS)) + 1e-3
        assert row["tokens/generated"] == pytest.approx(16 * row["completion/mean_length"])
        assert row["tokens/trained"] > row["tokens/generated"] - 16
        assert row["time/step"] == pytest.approx(row["time/rollout"] + row["time/score"] + row["time/update"])
        assert row["memory/peak_bytes"] > 10_000_000
        assert row["sampling/logp_difference"] < 1e-5
    assert any(0 < row["completion/truncated"] < 1 for row in rows)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_kl_starts_at_zero_and_grows(whole):
    first, *later = [row["kl"] for row in whole[0].metrics()]
    assert abs(first) < 1e-6
    assert min(later) > 1e-4


def test_the_policy_learns_what_is_rewarded(model_folder, tmp_path):
    recipe = recipe_of(model_folder, training={"max_steps": 20, "learning_rate": 0.02}, data={"eval_size": 24})
    evaluation, _ = train(trainer_of(recipe, tmp_path / "run"))
    assert evaluation["after"]["reward/digits"] > evaluation["before"]["reward/digits"] + 0.2


def test_the_adapter_is_written_and_differs_from_its_start(whole):
    weights = adapter(whole[0])
    assert json.loads((whole[0].path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert all(w.any() for name, w in weights.items() if "lora_B" in name)  # B starts at zero


def test_evaluation_is_of_the_same_problems_before_and_after(model_folder, tmp_path, whole, monkeypatch):
    run, evaluation = whole
    assert run.evaluation() == evaluation
    for when in ("before", "after"):
        assert {"accuracy", "reward/mean", "reward/digits"} <= evaluation[when].keys()
        assert evaluation[when]["problems"] == 6
    assert evaluation["before"] != evaluation["after"]

    asked = []
    original = online.evaluate
    monkeypatch.setattr(online, "evaluate", lambda *args: asked.append(args[2]) or original(*args))
    trainer = trainer_of(recipe_of(model_folder, training={"max_steps": 0}), tmp_path / "still")
    still, _ = train(trainer)
    assert still["before"] == still["after"] == evaluation["before"]  # same problems, same random numbers, no training
    assert asked[0] is asked[1]
    trained = {example.columns["question"] for example in trainer.stream.examples}
    assert not trained & {example.columns["question"] for example in asked[0]}


def test_a_reward_that_edits_what_it_is_given_changes_nothing(model_folder, tmp_path, whole):
    def vandal(prompts, completions, prompt_ids, completion_ids, **columns):
        values = digits(completions)
        for given in (*prompt_ids, *completion_ids):
            given[:] = [5, 6, 7]
        for given in (prompts, completions, prompt_ids, completion_ids, *columns.values()):
            if isinstance(given, list):
                given.clear()
        return values

    trainer = trainer_of(recipe_of(model_folder), tmp_path / "run", vandal)
    assert train(trainer)[0] == whole[1]
    assert learned(trainer.run) == learned(whole[0]) and same(adapter(trainer.run), adapter(whole[0]))


def test_samples_are_written_with_their_numbers(whole):
    samples = whole[0].samples()
    assert [s["step"] for s in samples] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    for sample in samples:
        assert sample["rewards"]["digits"] == pytest.approx(digits([sample["completion"]])[0])
        assert math.isfinite(sample["advantage"])


def test_every_step_has_random_numbers_of_its_own_and_every_seed_others(model_folder, tmp_path, monkeypatch):
    seeds = []
    original = SharedPromptEngine.generate

    def generate(engine, prompts, count, *args, seed, **kwargs):
        if count == 4:  # of a step; the evaluation has the same numbers every time
            seeds.append(seed)
        return original(engine, prompts, count, *args, seed=seed, **kwargs)

    monkeypatch.setattr(SharedPromptEngine, "generate", generate)
    for seed in (0, 1):
        train(trainer_of(recipe_of(model_folder, training={"seed": seed}), tmp_path / str(seed)))
    assert len(set(seeds)) == len(seeds) == 8


# Resume


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(model_folder, tmp_path, optim, dtype):
    recipe = recipe_of(
        model_folder,
        hardware={"optim": optim, "compute_dtype": dtype},
        lora={"r": 64, "lora_alpha": 64},  # adapters large enough for 8-bit moments
        training={"warmup_steps": 1},
    )
    uninterrupted = trainer_of(recipe, tmp_path / "whole")
    wanted, _ = train(uninterrupted)
    if optim == "adamw_8bit":
        states = uninterrupted.optimizer.torch_optimizer.state.values()
        assert any(state["state1"].dtype == torch.uint8 for state in states)

    stopped = trainer_of(recipe, tmp_path / "run", Failing(3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert stopped.run.latest_checkpoint()[0] == 2
    resumed = trainer_of(recipe, tmp_path / "run", resume=True)
    assert resumed.step == 2
    got, _ = train(resumed)
    assert same(adapter(resumed.run), adapter(uninterrupted.run))
    assert learned(resumed.run) == learned(uninterrupted.run)
    assert resumed.run.samples() == uninterrupted.run.samples()
    assert got == wanted


def test_a_resumed_run_goes_on_with_its_entropy_coefficient(model_folder, tmp_path):
    entropy = {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_delta": 0.1}
    recipe = recipe_of(model_folder, grpo={**entropy, "top_entropy_quantile": 0.5}, training={"max_steps": 3})
    whole = trainer_of(recipe, tmp_path / "whole")
    train(whole)
    stopped = trainer_of(recipe, tmp_path / "run", Failing(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    resumed = trainer_of(recipe, tmp_path / "run", resume=True)
    train(resumed)
    assert same(adapter(resumed.run), adapter(whole.run))
    rows = resumed.run.metrics()
    assert [row["entropy_coef"] for row in rows] == pytest.approx([0.1, 0.2, 0.3])
    assert rows[0]["policy_loss"] == rows[0]["loss"] and rows[1]["policy_loss"] > rows[1]["loss"]
    assert all(0.4 < row["policy/left_out"] < 0.6 for row in rows)


def test_a_finished_run_can_be_made_longer(model_folder, tmp_path):
    def recipe(steps):
        return recipe_of(model_folder, training={"max_steps": steps, "lr_scheduler_type": "constant"})

    uninterrupted = trainer_of(recipe(4), tmp_path / "whole")
    train(uninterrupted)
    short = trainer_of(recipe(2), tmp_path / "run")
    after_two, _ = train(short)
    longer = trainer_of(recipe(4), tmp_path / "run", resume=True)
    evaluation, _ = train(longer)
    assert same(adapter(longer.run), adapter(uninterrupted.run))
    assert learned(longer.run) == learned(uninterrupted.run)
    assert evaluation["before"] == after_two["before"]
    assert evaluation["after"] != after_two["after"]


def test_checkpoints_come_every_save_steps_and_at_the_end(model_folder, tmp_path):
    recipe = recipe_of(model_folder, training={"save_steps": 2, "max_steps": 5, "save_total_limit": 9})
    trainer = trainer_of(recipe, tmp_path / "run")
    train(trainer)
    assert sorted(p.name for p in (trainer.run.path / "checkpoints").iterdir()) == ["step-2", "step-4", "step-5"]


# What stops a run


def test_a_failing_reward_keeps_the_finished_steps(model_folder, tmp_path, whole):
    recipe = recipe_of(model_folder)
    stopped = trainer_of(recipe, tmp_path / "run", Failing(3, ZeroDivisionError("by zero")))
    with pytest.raises(RunError, match="reward function digits failed: ZeroDivisionError: by zero"):
        train(stopped)
    assert stopped.run.latest_checkpoint()[0] == 2
    assert [row["step"] for row in stopped.run.metrics()] == [1, 2]
    assert not (stopped.run.path / "adapter").exists()
    resumed = trainer_of(recipe, tmp_path / "run", resume=True)
    train(resumed)
    assert same(adapter(resumed.run), adapter(whole[0]))


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_rewards_that_never_differ_are_an_error(model_folder, tmp_path, beta):
    recipe = recipe_of(model_folder, grpo={"beta": beta}, training={"max_steps": 2})
    trainer = trainer_of(recipe, tmp_path / "run", lambda completions, **_: [1.0] * len(completions))
    with pytest.raises(RunError, match="nothing was learned"):
        train(trainer)
    assert not (trainer.run.path / "adapter").exists()


def test_rewards_are_not_blamed_where_they_differed(model_folder, tmp_path):
    trainer = trainer_of(recipe_of(model_folder, training={"max_steps": 1}), tmp_path / "run")
    train(trainer)
    seen = trainer.seen
    assert seen == Seen(16, seen.ended, 16, 16, seen.judged_apart, seen.cut_with_advantage) and seen.judged_apart
    assert trainer.why_nothing().startswith(
        "nothing was learned, although completions of a prompt had different rewards"
    )
    trainer.load_state(
        {"seen": {"completions": 16, "ended": 3, "rewarded": 16, "unlike": 16}}
    )  # of an older checkpoint
    assert trainer.why_nothing().startswith("nothing was learned: in every step all completions of each prompt had the")


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_first_step_without_signal_does_not_stop_the_run(model_folder, tmp_path, beta):
    calls = itertools.count()

    def reward(completions, **columns):
        return [1.0] * len(completions) if next(calls) < 2 else digits(completions)

    trainer = trainer_of(recipe_of(model_folder, grpo={"beta": beta}), tmp_path / "run", reward)
    train(trainer)
    first, second = trainer.run.metrics()[:2]
    assert (first["reward/std"], first["grad_norm"]) == (0, 0)
    assert second["grad_norm"] > 0


def test_an_adapter_that_does_not_move_is_an_error(model_folder, tmp_path):
    recipe = recipe_of(model_folder, training={"learning_rate": 1e-60})  # zero in float32
    with pytest.raises(RunError, match="did not change the adapter"):
        train(trainer_of(recipe, tmp_path / "run"))


def test_a_warm_up_may_start_at_a_learning_rate_of_zero(model_folder, tmp_path):
    trainer = trainer_of(recipe_of(model_folder, training={"warmup_steps": 2}), tmp_path / "run")
    train(trainer)
    rates = [row["learning_rate"] for row in trainer.run.metrics()]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 5e-3])
    assert trainer.run.metrics()[1]["kl"] == pytest.approx(0, abs=1e-6)  # the first step moved nothing


def test_an_adapter_that_does_not_move_after_the_warm_up_is_an_error_too(model_folder, tmp_path, monkeypatch):
    recipe = recipe_of(model_folder, training={"warmup_steps": 1})
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args, **given: None)
    trainer = trainer_of(recipe, tmp_path / "run")
    with pytest.raises(RunError, match="did not change the adapter"):
        train(trainer)
    assert [row["step"] for row in trainer.run.metrics()] == [1]


# Memory that runs out


def limited(function, fits, size_of, when=lambda: True):
    """Wrap a function that runs out of memory above a size."""

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)  # the work is lost, as when the last allocation fails
        if when() and size_of(*args) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    return wrapped


def fed(base, batch, *_):
    return batch.input_ids.numel()


# what runs out, its limit, the sizes after the run: completions at once, tokens in a micro-batch
OUT = {
    "rollout": (
        SharedPromptEngine,
        "generate",
        lambda engine, prompts, count, length, sampling, limits: limits.rows,
        5,
        (4, 4096),
    ),
    "evaluation": (
        online,
        "evaluate",
        lambda base, engine, examples, recipe, rewards, limits, *_: limits.rows,
        8,
        (8, 4096),
    ),
    "scoring": (
        grpo,
        "completion_logprobs",
        lambda base, groups, passes, *_: passes.micro_batch_tokens,
        1024,
        (16, 1024),
    ),
    "update": (
        update_module,
        "backward",
        lambda base, batch, objective, passes, *_: passes.micro_batch_tokens,
        200,
        (16, 128),
    ),
    "forward": (update_module, "packed_logprobs", fed, 100, (16, 64)),
}


@pytest.mark.parametrize("where", OUT)
def test_a_step_goes_on_with_less_memory_and_the_same_result(model_folder, tmp_path, whole, monkeypatch, where):
    module, name, size_of, fits, sizes = OUT[where]
    monkeypatch.setattr(module, name, limited(getattr(module, name), fits, size_of))
    trainer = trainer_of(recipe_of(model_folder), tmp_path / "run")
    _, said = train(trainer)
    said = [line for line in said if not line.startswith("before training: held-out ")]
    assert said
    assert all("the device's memory ran out" in line for line in said)
    assert any("ran out with hardware." in line for line in said)
    ladder = trainer.ladder
    tokens = ladder.score_batch_tokens if where == "scoring" else ladder.micro_batch_tokens
    assert (ladder.rollout_batch_size, tokens) == sizes
    for mine, theirs in zip(trainer.run.metrics(), whole[0].metrics(), strict=True):
        for key in ("reward/mean", "completion/mean_length", "loss", "kl", "entropy", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    wanted = adapter(whole[0])
    for name, weight in adapter(trainer.run).items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["rollout", "scoring", "update"])
def test_memory_that_never_suffices_ends_the_run_at_the_last_finished_step(
    model_folder, tmp_path, whole, monkeypatch, where
):
    module, name, size_of, _, _ = OUT[where]
    recipe = recipe_of(model_folder)
    trainer = trainer_of(recipe, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, limited(getattr(module, name), 0, size_of, when=lambda: trainer.step == 2))
        with pytest.raises(
            RunError, match=r"ran out in the \w+ phase even with hardware\.\w+=(1|64);.*are predicted for it and"
        ):
            train(trainer)
    assert trainer.run.latest_checkpoint()[0] == 2
    resumed = trainer_of(recipe, tmp_path / "run", resume=True)
    train(resumed)
    assert same(adapter(resumed.run), adapter(whole[0]))


@pytest.mark.parametrize("iteration", [1, 2])
def test_a_step_interrupted_after_an_optimizer_step_is_taken_back(model_folder, tmp_path, monkeypatch, iteration):
    recipe = recipe_of(model_folder, grpo={"num_iterations": 2}, training={"save_steps": 2})
    uninterrupted = trainer_of(recipe, tmp_path / "whole")
    train(uninterrupted)
    trainer = trainer_of(recipe, tmp_path / "run")
    original, taken = Optimizer.step, itertools.count(1)

    def step(self, *loss, **before):
        norm = original(self, *loss, **before)
        if next(taken) == 6 + iteration:  # of the fourth step; the third is finished and not yet saved
            raise KeyboardInterrupt
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(trainer)
    resumed = trainer_of(recipe, tmp_path / "run", resume=True)
    assert resumed.step == 3
    train(resumed)
    assert same(adapter(resumed.run), adapter(uninterrupted.run))


def test_a_run_whose_sampling_is_wrong_stops(tmp_path, monkeypatch, model_folder):
    right = fast_decoder._rotated
    trainer = trainer_of(recipe_of(model_folder), tmp_path / "run")
    monkeypatch.setattr(fast_decoder, "_rotated", lambda x, cos, sin: right(x, cos, -sin))
    with pytest.raises(RunError, match="step 1: log-probs of sampled tokens differ"):
        train(trainer)
