"""Numbers that have left the road, and runs that would learn nothing: noticed and named, in every algorithm."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_classifiers import save_classifier
from tiny_runs import at_rate, tiny_recipe, write_jsonl

from lowmem_rlhf.algorithms.classifier.fit import train_classifier
from lowmem_rlhf.engine.checksum import base_checksum
from lowmem_rlhf.engine.roles import CRITIC, POLICY, REFERENCE
from lowmem_rlhf.errors import LowmemError, RunError, UserError
from lowmem_rlhf.progress import Silence, shown_by
from lowmem_rlhf.recipe.sections import LearnedReward, TrainingConfig
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.rollout.scores import Scores
from lowmem_rlhf.session import train as session
from lowmem_rlhf.training.loop import Loop
from lowmem_rlhf.training.metrics import Seen
from lowmem_rlhf.training.optimizer import MOST_SKIPPED, Optimizer

ONLINE = ("grpo", "ppo", "rloo", "reinforce_plus_plus")
ALGORITHMS = (*ONLINE, "sft", "reward_model", "trl/dpo")
BASES = [  # the passes of RLOO and REINFORCE++ are PPO's
    (algorithm, quantization)
    for algorithm in ALGORITHMS
    for quantization in ("none", "int8", "nf4")
    if quantization == "nf4" or algorithm not in ("rloo", "reinforce_plus_plus")
]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": "12", "rejected": "abc"} for a in range(4) for b in range(2)]
DATA = {"template": None, "prompt": "prompt", "answer": None, "train_size": None, "eval_size": 0}


class Heard(Silence):
    """A display that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def plan(self, plan: dict[str, Any]) -> None:
        """Show nothing."""


@pytest.fixture
def loop(tiny_model, tmp_path) -> Callable[..., Loop]:
    """Return a function that opens a run of an algorithm, ready to train, in a folder of its own."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)

    def opened(algorithm: str, name: str = "run", resume: bool = False, **sections: Any) -> Loop:
        hardware = {"gradient_checkpointing": False, **sections.pop("hardware", {})}
        if hardware.get("quantization") == "int8":
            hardware["compute_dtype"] = "bfloat16"
        training = {"max_steps": 2, "save_steps": 100, **sections.pop("training", {})}
        sections = {"data": {"eval_size": 0}, "hardware": hardware, "training": training, **sections}
        if algorithm not in ONLINE:
            data = {**DATA, "train": str(pairs), **({"completion": "chosen"} if algorithm == "sft" else {})}
            own = {"trl": {"max_length": 32}} if algorithm.startswith("trl") else {algorithm: {"max_length": 32}}
            sections |= {"rewards": [], "data": data, **own}
        elif algorithm != "grpo":
            sections["ppo"] = {"num_ppo_epochs": 1, **sections.get("ppo", {})}
        recipe, display = tiny_recipe(tiny_model, algorithm=algorithm, **sections), Heard()
        checked = session.check(recipe, tmp_path / name, resume, display)
        return session.open_run_of(session.plan(checked, display), display)

    return opened


def error_of(trainer: Loop, kind: type[LowmemError] = RunError) -> tuple[str, list[str]]:
    """Return the sentence that a run ends with, and what it said before."""
    heard = Heard()
    with pytest.raises(kind) as caught:
        trainer.train(heard)
    assert "\n" not in str(caught.value)
    return str(caught.value), heard.said


def adapter(trainer: Loop) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.optimizer.parameters.items()}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())


# The base


@pytest.mark.parametrize(("algorithm", "quantization"), BASES)
def test_training_leaves_the_base_as_it_was_and_a_drift_ends_the_run(loop, algorithm, quantization):
    trainer = loop(algorithm, hardware={"check": "always", "quantization": quantization})
    before = base_checksum(trainer.base)
    start = adapter(trainer)
    trainer.train(Heard())
    assert base_checksum(trainer.base) == before and not same(start, adapter(trainer))
    weights = dict(trainer.base.named_parameters())
    frozen = next(p for name, p in weights.items() if "up_proj" in name and not p.requires_grad)
    with torch.no_grad():
        frozen.view(-1)[3] += 1 if quantization != "none" else 2**-20
    assert base_checksum(trainer.base) != before


@pytest.mark.parametrize("checked", [True, False])
def test_a_base_that_drifts_while_it_trains_is_an_error_where_it_is_checked(loop, checked):
    assert not Loop.base_is_always_checked
    trainer = loop("grpo", hardware={"check": "always" if checked else "auto"})
    step = trainer.one_step

    def drifting(progress: Any) -> Any:
        with torch.no_grad():
            trainer.base.model.get_input_embeddings().weight[3, 3] += 2**-10
        return step(progress)

    trainer.one_step = drifting  # type: ignore[method-assign]
    if checked:
        assert "frozen base is not the one that the run began with" in error_of(trainer)[0]
        assert not (trainer.run.path / "adapter").exists()
    else:
        trainer.train(Heard())


def test_scales_of_quantized_weights_belong_to_the_base(loop):
    for kind in ("nf4", "int8"):
        base = loop("sft", name=kind, hardware={"quantization": kind}).base
        before, layer = base_checksum(base), next(base.adapter_layers()).base_layer
        if kind == "nf4":
            scale = layer.weight.quant_state.state2.absmax
        else:  # after a call it lies beside the weight
            scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        scale.view(-1)[0] *= 1.5
        assert base_checksum(base) != before


# Numbers that are not finite


def broken_from(trainer: Loop, step: int, value: float) -> None:
    """Let the first frozen norm of the model be no number from this step's update on."""
    update = trainer.ladder.update

    def breaking(work: Any, say: Any) -> Any:
        norm = next(p for name, p in trainer.base.named_parameters() if "input_layernorm" in name)
        kept = norm.detach().clone()
        with torch.no_grad():
            if trainer.step + 1 >= step:
                norm[0] = value
            try:
                with torch.enable_grad():
                    return update(work, say)
            finally:
                norm.copy_(kept)

    trainer.ladder.update = breaking  # type: ignore[method-assign]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_steps_whose_loss_is_no_number_are_left_out_and_end_the_run_with_the_cause(loop, algorithm):
    trainer = loop(algorithm, training={"max_steps": 20})
    broken_from(trainer, 2, math.nan)
    states = []
    step = trainer.one_step

    def watched(progress: Any) -> Any:
        states.append(adapter(trainer))
        return step(progress)

    trainer.one_step = watched  # type: ignore[method-assign]
    error, said = error_of(trainer)
    first = "scores" if algorithm == "reward_model" else "logits"
    assert f"{MOST_SKIPPED} optimizer steps in a row" in error and f"the first was the {first} (nan) of step 2" in error
    assert "training.learning_rate" in error
    assert sum("is not finite: the optimizer step is left out" in sentence for sentence in said) == 1
    assert not same(states[0], states[1])  # the first step was taken
    assert same(states[1], adapter(trainer))  # and none after it
    assert [row["loss_scale/skipped_steps"] for row in trainer.run.metrics()] == [0, 1, 2, 3, 4]


def test_one_odd_step_is_survived_and_counted(loop):
    trainer = loop("sft", training={"max_steps": 4})
    step, update = trainer.one_step, trainer.ladder.update
    broken_from(trainer, 2, math.inf)

    def only_second(progress: Any) -> Any:
        if trainer.step == 2:
            trainer.ladder.update = update  # type: ignore[method-assign]
        return step(progress)

    trainer.one_step = only_second  # type: ignore[method-assign]
    heard = Heard()
    trainer.train(heard)
    rows = trainer.run.metrics()
    assert [row["loss_scale/skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert rows[1]["loss"] is None and all(math.isfinite(row["loss"]) for row in rows if row["step"] != 2)
    assert "of step 2 is not finite" in " ".join(heard.said)


def test_a_run_whose_steps_were_all_left_out_says_that_and_not_another_reason(loop):
    trainer = loop("grpo", training={"max_steps": 3})
    broken_from(trainer, 1, math.nan)
    error, _ = error_of(trainer)
    assert error.startswith("nothing was learned: optimizer steps were left out; the first was left out for the logits")
    assert "same reward" not in error


def test_a_resumed_run_goes_on_with_the_count(loop):
    trainer = loop("sft", training={"max_steps": 4, "save_steps": 4})
    broken_from(trainer, 2, math.nan)
    trainer.train(Heard())
    resumed = loop("sft", resume=True, training={"max_steps": 20, "save_steps": 4})
    broken_from(resumed, 1, math.nan)
    assert f"{MOST_SKIPPED} optimizer steps in a row" in error_of(resumed)[0]
    assert resumed.step == 5 and "of step 2" in error_of(resumed)[0]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "sft"])
@pytest.mark.parametrize("rate", [1e30, 1e36])
def test_a_learning_rate_that_ruins_the_weights_ends_with_a_sentence(loop, algorithm, rate):
    trainer = loop(algorithm, training={"max_steps": 30})
    at_rate(trainer.optimizer, rate)
    error, _ = error_of(trainer)
    assert "not finite" in error or "no longer finite" in error
    assert "learning_rate" in error


def test_rewards_beyond_float32_are_named(loop, tmp_path):
    (tmp_path / "huge.py").write_text(
        "def huge(completions, **columns):\n    return [1e30 * len(c) for c in completions]"
    )
    trainer = loop("grpo", rewards=[{"function": f"{tmp_path / 'huge.py'}:huge"}])
    start = adapter(trainer)
    error, _ = error_of(trainer)
    assert "advantages are computed in float32, which overflows beyond 1e+18" in error
    assert same(start, adapter(trainer))


# Steps without any gradient


def test_a_step_in_which_all_rewards_are_equal_leaves_the_adapter_as_it_is(loop, tmp_path):
    (tmp_path / "sometimes.py").write_text(
        "def sometimes(completions, trainer_state=None, **columns):\n"
        "    return [float(len(c)) * (trainer_state.global_step % 2 == 0) for c in completions]"
    )
    reward = [{"function": f"{tmp_path / 'sometimes.py'}:sometimes"}]
    training = {"max_steps": 4, "weight_decay": 0.5, "lr_scheduler_type": "linear"}
    trainer = loop("grpo", rewards=reward, grpo={"beta": 0.0}, training=training)
    before = adapter(trainer)
    for step in trainer.steps(Heard()):
        after = adapter(trainer)
        taught = step.learned_tokens > 0
        assert taught == (step.metrics["step"] % 2 == 1) and (step.metrics["grad_norm"] > 0) == taught
        assert same(before, after) != taught
        before = after
    assert trainer.optimizer.scheduler.last_epoch == 4 and trainer.optimizer.taken == 2
    rates = [row["learning_rate"] for row in trainer.run.metrics()]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


# Runs that would learn nothing


def test_a_warm_up_as_long_as_the_run_is_said_and_one_step_of_it_refused(loop):
    training = {"lr_scheduler_type": "linear", "warmup_steps": 5}
    heard = Heard()
    loop("sft", training=training).train(heard)
    assert "training.warmup_steps=5 is no less than the run's 2 optimizer steps" in heard.said[0]
    with pytest.raises(UserError, match=r"training.warmup_steps: got 5 for a run of one optimizer step"):
        loop("sft", training={**training, "max_steps": 1})
    loop("sft", name="steady", training={"warmup_steps": 5, "max_steps": 1}).train(Heard())  # a constant rate has none


def test_a_step_of_several_optimizer_steps_counts_where_one_of_them_has_a_rate(loop):
    training = {"max_steps": 1, "warmup_steps": 1, "lr_scheduler_type": "linear"}
    trainer = loop("ppo", training=training, ppo={"num_ppo_epochs": 4, "num_mini_batches": 1})
    trainer.train(Heard())
    assert trainer.learned_tokens and trainer.run.metrics()[0]["learning_rate"] == 0


def test_completions_that_were_cut_and_left_out_are_named():
    easy = [Completion([4, 1], [0.0] * 2, False), Completion([5, 1], [0.0] * 2, False)]  # both right
    hard = [Completion([4, 4, 4], [0.0] * 3, True), Completion([5, 5, 5], [0.0] * 3, True)]
    scores = Scores({"r": [1.0, 1.0, 0.0, 1.0]}, [1.0, 1.0, 0.0, 1.0])
    rollout = Rollout([[3], [6]], easy + hard, 2, scores=scores, advantages=[0.0, 0.0, -0.7, 0.7])
    said = Seen().with_rollout(rollout).why_nothing(3, cut_are_masked=True)
    assert "every completion with an advantage was cut at 3 tokens" in said and "mask_truncated_completions" in said
    assert Seen().with_rollout(replace(rollout, advantages=[0.0] * 4)).why_nothing(3, cut_are_masked=True) == ""


def test_a_rate_of_zero_in_every_step_that_teaches_is_named(loop, monkeypatch):
    monkeypatch.setattr(Optimizer, "learning_rate", property(lambda self: 0.0))
    for algorithm in ("grpo", "sft"):
        error, _ = error_of(loop(algorithm, name=algorithm))
        assert "the learning rate was 0 in every step that had something to teach" in error
        assert "same reward" not in error


def detached(patch: Any, trainer: Loop) -> None:
    """Let no loss reach the adapter."""
    original = trainer.base.states
    trainer.base.states = lambda batch: original(batch).detach()  # type: ignore[method-assign]
    stock = trainer.base.stock_states
    trainer.base.stock_states = lambda *given: stock(*given).detach()  # type: ignore[method-assign]


def frozen(patch: Any, trainer: Loop) -> None:
    """Let nothing train any more."""
    for parameter in trainer.optimizer.parameters.values():
        parameter.requires_grad_(False)


def still(patch: Any, trainer: Loop) -> None:
    """Let the optimizer's step move nothing."""
    patch.setattr(trainer.optimizer.torch_optimizer, "step", lambda *given, **more: None)


@pytest.mark.parametrize("fault", [detached, frozen, still])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_would_train_nothing_is_an_error_at_the_first_step(loop, monkeypatch, algorithm, fault):
    trainer = loop(algorithm)
    fault(monkeypatch, trainer)
    error, _ = error_of(trainer)
    said = ("did not change the adapter",) if fault is still else ("the loss has no gradient", "did not change the")
    assert any(part in error for part in said), error
    assert not trainer.run.metrics()


def frozen_part(trainer: Loop, part: str) -> None:
    for name, parameter in trainer.optimizer.parameters.items():
        if part in name:
            parameter.requires_grad_(False)


@pytest.mark.parametrize("critic", ["adapter", "policy"])
def test_a_critic_that_does_not_learn_is_an_error(loop, critic):
    trainer = loop("ppo", ppo={"critic": critic})
    assert trainer.base.roles[CRITIC] != trainer.base.roles[REFERENCE]
    frozen_part(trainer, f".{CRITIC}.")
    frozen_part(trainer, f"heads.{CRITIC}")
    error, _ = error_of(trainer)
    assert "did not change the critic" in error or "the loss has no gradient" in error


@pytest.mark.parametrize("part", ["score head", "adapter"])
def test_a_reward_model_learns_with_both_parts(loop, part):
    trainer = loop("reward_model")
    for name, parameter in trainer.optimizer.parameters.items():
        if name.startswith("heads.") == (part == "score head"):
            parameter.requires_grad_(False)
    assert any(f".{POLICY}." in name for name in trainer.optimizer.parameters)
    assert f"did not change the {part}" in error_of(trainer)[0]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("bert") / "bert")


def fit(bert: Path, output: Path, rate: float = 1e-3) -> list[str]:
    """Train a classifier for a few steps; return what was said."""
    texts = [f"w{n} w{n + 1}" for n in range(16)], ["a", "b"] * 8
    training = TrainingConfig(prompts_per_step=4, lr_scheduler_type="constant")
    training = training.model_copy(update={"learning_rate": rate})  # also one that no recipe allows
    heard = Heard()
    with shown_by(heard):
        train_classifier(texts, output, LearnedReward(model=str(bert)), training, epochs=2)
    return heard.said


def test_a_classifier_that_learns_nothing_is_an_error(bert, tmp_path, monkeypatch):
    from lowmem_rlhf.rewards.encoder import Encoder

    assert fit(bert, tmp_path / "whole") == []
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *given, **more: None)
        with pytest.raises(RunError, match="did not change the body and the head"):
            fit(bert, tmp_path / "still")
    forward = Encoder.forward

    def without_gradient(self: Any, ids: Any) -> Any:
        with torch.no_grad():
            return forward(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", without_gradient)
        with pytest.raises(RunError, match="the loss has no gradient"):
            fit(bert, tmp_path / "detached")
    with pytest.raises(RunError, match=r"no longer finite|not finite"):
        fit(bert, tmp_path / "huge", rate=1e36)
    assert not any((tmp_path / name).exists() for name in ("still", "detached", "huge"))
