"""One PPO step of our engine with all four roles on one base, timed and measured by phase.

Policy and critic are adapters that train, the critic with a value head; the reference is the base without an adapter;
the reward model is a frozen adapter with a score head. The roles are put on the base as a run puts them
(`training.roles.add_roles`), and a step is what the online loop does: rollout, rewards,
`algorithms.ppo.trainer.PPO.learn`.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from our_step import Cut, OurStep, Prompts
from rich.console import Console
from safetensors.torch import load_file, save_file
from work import ALPHA, LEARNING_RATE, RANK

from lowmem_rlhf.algorithms.ppo.trainer import PPO
from lowmem_rlhf.architecture.adapters import HEAD, WEIGHTS
from lowmem_rlhf.bench.meter import Meter
from lowmem_rlhf.display.live import LiveView
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.roles import CRITIC, REWARD
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.adapter import AdapterReward, load_adapter_reward
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.rollout.scores import Scores
from lowmem_rlhf.training.optimizer import Optimizer
from lowmem_rlhf.training.roles import add_roles


@dataclass
class _Loop:
    """What `PPO.learn` asks of the loop that it is part of."""

    base: SharedBase
    optimizer: Optimizer
    ladder: Ladder
    step: int
    timed: Callable[[str], AbstractContextManager[None]]


class OurPPOStep(OurStep):
    """`OurStep` with a critic and a reward model beside policy and reference.

    Args:
        work: flags of the model, the device, the engine and the step.
    """

    def __init__(self, work: argparse.Namespace, device: torch.device) -> None:
        super().__init__(work.model, device)
        with tempfile.TemporaryDirectory() as folder:
            write_reward_adapter(self.base, Path(folder))
            recipe = _recipe(work, folder)
            self.reward: AdapterReward = load_adapter_reward("reward", folder, work.model)
            add_roles(self.base, recipe, [Reward("reward", self.reward)])
        self.ppo, self.view = PPO(recipe), LiveView(1, console=Console(file=StringIO()))
        self.optimizer = Optimizer(self.base.trainable(), recipe.training, "adamw", 100, device, scale_loss=False)

    def _step(self, meter: Meter, prompts: Prompts, generations: int, length: int, cut: Cut) -> tuple[list[int], int]:
        ladder = self.reward.ladder = cut.ladder(self.device)
        with meter.phase("rollout"):
            completions = self._rollout(prompts, generations, length, cut)
        with meter.phase("score"):
            repeated = [prompt for prompt in prompts for _ in range(generations)]
            rewards = self.reward(repeated, [completion.ids for completion in completions])
        rollout = Rollout(prompts, completions, generations, scores=Scores({"reward": list(rewards)}, rewards))
        loop: Any = _Loop(self.base, self.optimizer, ladder, self.taken, meter.phase)
        metrics = self.ppo.learn(rollout, loop, self.view).metrics
        self.taken += 1
        return [len(completion.ids) for completion in completions], metrics["tokens/trained"]

    def held(self) -> dict[str, int]:
        """Return the bytes of what there is for critic and reward model, after a step.

        ``critic_gradients`` live during an update only; ``critic_copies``, in the compute dtype, while the critic
        computes, and in the place of the policy's.
        """
        critic, reward = (_adapter(self.base, role) for role in (CRITIC, REWARD))
        trained = [*critic, *self.base.heads[CRITIC].parameters()]
        states = [value for p in trained for value in self.optimizer.torch_optimizer.state[p].values()]
        return {
            "critic_adapter": _bytes(critic),
            "critic_optimizer_state": _bytes(states),
            "critic_gradients": _bytes(trained),
            "reward_adapter": _bytes(reward),
            "heads": _bytes(self.base.heads.parameters()),
            "critic_copies": sum(weight.numel() for weight in critic) * self.base.dtype.itemsize,
        }


def write_reward_adapter(base: SharedBase, folder: Path) -> None:
    """Write a reward model with random weights, of the shape of the policy's adapter."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.01

    base.save_adapter(folder)
    state = load_file(folder / WEIGHTS)
    state |= {name: noise(*weight.shape) for name, weight in state.items() if "lora_B" in name}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    save_file({"weight": noise(1, base.hidden_size)}, folder / HEAD, metadata={"format": "pt"})


def _recipe(work: argparse.Namespace, reward: str) -> Recipe:
    return validate_recipe(
        {
            "name": "ppo_vs_trl",
            "model": work.model,
            "algorithm": "ppo",
            "lora": {"r": RANK, "lora_alpha": ALPHA},
            "data": {"train": "questions", "answer": None},
            "generation": {"num_generations": work.generations, "max_completion_length": work.completion_length},
            "rewards": [{"function": "reward_adapter", "options": {"adapter": reward}}],
            "ppo": {"kl_coef": work.kl_coef, "num_ppo_epochs": work.epochs, "num_mini_batches": 1},
            "training": {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"},
        }
    )


def _adapter(base: SharedBase, role: str) -> list[torch.Tensor]:
    return [weight for layer in base.adapter_layers() for weight in layer.masters(role)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
