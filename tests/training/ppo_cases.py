"""Bases with a critic, targets and gradients for the tests of PPO's update. Not a test module."""

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import fill_adapter, tiny_base
from training_cases import LIMIT, limits_of, logps_of, ragged_batch, shifted

from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings
from lowmem_rlhf.algorithms.ppo.update import Rows, Targets, backward
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.passes import BatchLimits, head_outputs, with_bootstrap_position
from lowmem_rlhf.engine.roles import CRITIC, INITIAL, POLICY
from lowmem_rlhf.rollout.rollout import Rollout

PROMPTS = (5, 2, 9, 30)


def ppo_batch(prompts: Sequence[int] = PROMPTS) -> Rollout:
    """Return `ragged_batch` for PPO, which has its advantages in the targets."""
    return ragged_batch([0.0] * 4 * len(prompts), prompts=prompts)


def base_with(critic: str | None, family: str = "llama", dtype: torch.dtype = torch.float32) -> SharedBase:
    """Return a tiny base whose policy, critic and value head are all random."""
    base, _ = tiny_base(family, dtype=dtype)
    add_critic(base, critic)
    return base


def add_critic(base: SharedBase, critic: str | None) -> None:
    """Add a critic of its own (``adapter``), its own ``above the start``, a head on the ``policy``, or none."""
    if critic == "policy":
        base.roles[CRITIC] = base.roles[POLICY]
    elif critic:
        below = INITIAL if critic == "above the start" else ""
        if below:
            base.add_role(INITIAL, 3, 6, "all-linear", seed=5)
            fill_adapter(base, seed=6)
            base.freeze(INITIAL)
        base.add_role(CRITIC, 2, 4, "all-linear", seed=7, below=below)
    if critic:
        base.add_head(CRITIC, bias=True)
    fill_adapter(base, seed=8)


def ppo_settings(**changes: Any) -> PPOSettings:
    """Return PPO's settings."""
    return PPOSettings.model_validate(changes)


def rows_of(lengths: Sequence[int], seed: int, size: float = 1.0) -> Rows:
    """Return random numbers by row."""
    generator = torch.Generator().manual_seed(seed)
    return {row: torch.randn(n, generator=generator) * size for row, n in enumerate(lengths)}


def targets_of(
    base: SharedBase,
    batch: Rollout,
    temperature: float = 1.0,
    by_sequence: bool = False,
    bootstrap_position: bool = False,
) -> Targets:
    """Return targets of a policy and a critic some updates ago, far enough for every clipping to take part."""
    lengths = [len(c.ids) for c in batch.completions]
    old = shifted(logps_of(base, batch, POLICY, temperature), by=0.3 if by_sequence else 0.5)
    if by_sequence:
        return Targets(old, rows_of([1] * len(lengths), seed=1), by_sequence=True)
    valued = [min(n + 1, LIMIT) for n in lengths] if bootstrap_position else lengths
    advantages = rows_of(lengths, seed=1)
    if CRITIC not in base.heads:
        return Targets(old, advantages)
    groups = batch.groups(range(len(lengths)))
    values = head_outputs(base, CRITIC, with_bootstrap_position(groups) if bootstrap_position else groups, limits_of())
    old_values = {row: values[row][: len(noise)] + noise for row, noise in rows_of(valued, 2, 0.3).items()}
    returns = {row: old_values[row] + noise for row, noise in rows_of(valued, 3).items()}
    return Targets(old, advantages, old_values, returns, bootstrap_position=bootstrap_position)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether the weights are the same, bit by bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def ppo_gradients(
    base: SharedBase,
    batch: Rollout,
    targets: Targets,
    settings: PPOSettings,
    limits: BatchLimits,
    rows: Sequence[int] | None = None,
    loss_scale: float = 1.0,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return what `backward` gives for these rows (default: all), and every trained parameter's gradient."""
    for p in base.trainable().values():
        p.grad = torch.zeros_like(p)
    rows = range(len(batch.completions)) if rows is None else rows
    part = backward(base, batch, list(rows), targets, settings, limits, loss_scale)
    return part, {name: p.grad.clone() for name, p in base.trainable().items()}  # type: ignore[union-attr]
