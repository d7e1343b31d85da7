"""What a critic may have for itself: a learning rate, a gradient norm, steps before the policy's, normalised values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import learned, save_tiny_model, tiny_recipe
from torch import nn

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import TrainingConfig
from lowmem_rlhf.report import html
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.online import Trainer
from lowmem_rlhf.training.optimizer import Optimizer, OwnRate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("critic")
    save_tiny_model(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(html, "write_report", lambda run: None)


def run(place: Path, name: str, steps: int = 2, resume: bool = False, weight: float = 1.0, **ppo: Any) -> RunDirectory:
    recipe = tiny_recipe(
        place / "model",
        algorithm="ppo",
        ppo={"num_ppo_epochs": 2, **ppo},
        rewards=[{"function": "length", "options": {"target": 12}, "weight": weight}],
        data={"eval_size": 0},
        training={"max_steps": steps, "prompts_per_step": 2, "save_steps": 1},
    )
    return train(recipe, place / name, resume)


def adapters(run: RunDirectory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return policy and critic; of a critic on the policy's trunk its head."""
    files = sorted((run.path / "adapter" / "critic").glob("*.safetensors"))
    critic = {f"{file.stem}.{name}": one for file in files for name, one in load_file(file).items()}
    return load_file(run.path / "adapter" / "adapter_model.safetensors"), critic


def optimizer_of(own: OwnRate | None, grads: dict[str, float]) -> tuple[Optimizer, dict[str, nn.Parameter]]:
    parameters = {name: nn.Parameter(torch.zeros(4, dtype=torch.float32, device=CPU)) for name in grads}
    training = TrainingConfig(learning_rate=0.01, lr_scheduler_type="constant", max_grad_norm=1.0)
    optimizer = Optimizer(parameters, training, "adamw", 5, CPU, scale_loss=False, own=own)
    for name, value in grads.items():
        parameters[name].grad = torch.full((4,), value, dtype=torch.float32, device=CPU)
    return optimizer, parameters


def test_a_critic_s_gradient_takes_nothing_of_the_policy_s_room():
    grads = {"critic.a": 1000.0, "policy": 0.25}
    together, shared = optimizer_of(None, grads)
    assert together.step() == pytest.approx(2000.0, rel=1e-4) and float(shared["policy"].grad.norm()) < 1e-3
    apart, own = optimizer_of(OwnRate(frozenset({"critic.a"}), 0.05, 2.0), grads)
    assert apart.step() == pytest.approx(0.5) and apart.own_norm == pytest.approx(2000.0)
    assert float(own["policy"].grad.norm()) == pytest.approx(0.5) and float(
        own["critic.a"].grad.norm()
    ) == pytest.approx(2)
    assert own["policy"].tolist() == pytest.approx([-0.01] * 4) and own["critic.a"].tolist() == pytest.approx(
        [-0.05] * 4
    )


def test_a_norm_beyond_float32_is_clipped_by_itself_as_well():
    optimizer, parameters = optimizer_of(OwnRate(frozenset({"critic.a"}), 0.05, 2.0), {"critic.a": 3e38, "policy": 1.0})
    optimizer.step()
    assert optimizer.skipped == 0 and optimizer.own_norm == pytest.approx(6e38)
    assert float(parameters["critic.a"].grad.norm()) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("name", ["critic.a", "policy"])
def test_a_step_with_a_number_that_is_not_finite_is_left_out_whosever_it_is(name):
    optimizer, parameters = optimizer_of(OwnRate(frozenset({"critic.a"}), 0.05, 2.0), {"critic.a": 1.0, "policy": 1.0})
    parameters[name].grad[1] = float("nan")
    optimizer.step()
    assert optimizer.skipped == 1 and not any(bool(one.any()) for one in parameters.values())


@pytest.mark.parametrize("critic", ["adapter", "policy"])
def test_in_its_first_steps_the_critic_learns_alone(place, critic):
    warm = run(place, f"warm-{critic}", 3, critic=critic, critic_warmup_steps=2)
    first, second, third = warm.metrics()
    assert first["kl"] == second["kl"] == third["kl"] == pytest.approx(0, abs=1e-6)
    assert [row["entropy"] is None for row in (first, second, third)] == [True, True, False]
    assert first["policy/approx_kl"] is None and third["policy/approx_kl"] is not None
    assert first["value/loss"] != second["value/loss"]
    policy, critic_after = adapters(warm)
    assert any(bool(one.any()) for name, one in policy.items() if "lora_B" in name)
    assert any(bool(one.any()) for one in critic_after.values())


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(place, monkeypatch, stop):
    """Also where it was stopped while the critic learned alone, and only the critic has moments."""
    settings = {"critic_learning_rate": 0.02, "critic_warmup_steps": 2, "normalize_values": True, "kl_target": 6.0}
    whole = learned(run(place, f"whole-{stop}", 3, **settings))
    assert [row["objective/kl_coef"] for row in whole["metrics"]] == [0.05] * 3
    assert all(row["grad_norm/critic"] > 0 for row in whole["metrics"][:2])
    rollout = Trainer._rollout

    def stopped(self, progress):
        if self.step == stop:
            raise KeyboardInterrupt
        return rollout(self, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_rollout", stopped)
        run(place, f"part-{stop}", 3, **settings)
    again = learned(run(place, f"part-{stop}", 3, resume=True, **settings))
    assert all((again["adapter"].pop(name) == one).all() for name, one in whole.pop("adapter").items())
    assert again.pop("adapter") == {} and again == whole


def test_a_critic_of_normalised_returns_learns_the_same_at_any_scale_of_rewards(place):
    """Policy gradients are the same too, since advantages are whitened; without it the critic learns other numbers."""
    settings = {"kl_coef": 0.0, "normalize_values": True, "cliprange_value": None}
    small, large = (run(place, f"scale-{weight:g}", 2, weight=weight, **settings) for weight in (1.0, 50.0))
    for ours, theirs in zip(adapters(small), adapters(large), strict=True):
        for name, one in ours.items():
            assert float((one - theirs[name]).norm()) <= 0.06 * float(one.norm()) + 1e-6, name
    losses = [[row["value/loss"] for row in one.metrics()] for one in (small, large)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    once = run(place, "once", 3, normalize_values=True, num_ppo_epochs=1)
    assert [row["value/clip_fraction"] for row in once.metrics()] == [
        0.0
    ] * 3  # the critic is still the one that valued
    returns = [[row["value/returns_mean"] for row in one.metrics()] for one in (small, large)]
    assert [50 * one for one in returns[0]] == pytest.approx(returns[1], rel=0.01)


@pytest.mark.parametrize(("algorithm", "epochs"), [("ppo", 4), ("rloo", 1), ("reinforce_plus_plus", 1)])
def test_the_epochs_are_those_that_suit_the_algorithm_unless_the_recipe_says_so(algorithm, epochs):
    assert tiny_recipe("m", algorithm=algorithm).ppo.num_ppo_epochs == epochs
    assert tiny_recipe("m", algorithm=algorithm, ppo={"num_ppo_epochs": 3}).ppo.num_ppo_epochs == 3


def test_a_policy_that_would_never_move_is_refused():
    with pytest.raises(UserError, match="got 3 of 3 steps"):
        tiny_recipe("m", algorithm="ppo", ppo={"critic_warmup_steps": 3}, training={"max_steps": 3})
