"""Learned rewards by name: loaded once, each placed beside the policy or on the CPU."""

from dataclasses import dataclass
from typing import Any

import torch

from lowmem_rlhf.errors import LowmemError, RunError, UserError
from lowmem_rlhf.hardware.detect import detect, torch_reaches
from lowmem_rlhf.planning.inputs import PINNED
from lowmem_rlhf.planning.placement import reward_bytes, reward_device
from lowmem_rlhf.recipe.sections import LEARNED_REWARDS, ClassifierReward, RewardConfig, SimilarityReward
from lowmem_rlhf.rewards.classifier import Classifier, load_classifier
from lowmem_rlhf.rewards.similarity import Similarity, load_similarity


@dataclass
class DeviceBudget:
    """The policy's device, and what is still free there for rewards."""

    device: str = "cpu"
    free_bytes: int = 0


def load_learned(config: RewardConfig, budget: DeviceBudget) -> tuple[Classifier | Similarity, str, str]:
    """Load a learned reward; return it with its device and why it is there. Takes what it needs from the budget.

    Raises:
        UserError: an option that the model or the machine does not have; the message names the reward.
        RunError: the memory of its device ran out.
    """
    options: Any = LEARNED_REWARDS[config.function].model_validate(config.options)
    try:
        reward = _load(options)
        device, reason = _placed(reward, options.device, budget)
        try:
            reward.encoder.to(device)
        except RunError as error:
            if options.device != "auto":
                raise
            device, reason = "cpu", str(error)
            reward.encoder.to(device)
    except LowmemError as error:
        raise type(error)(f"rewards: {config.name}: {error}") from error
    return reward, device, reason


def _load(options: Any) -> Classifier | Similarity:
    if isinstance(options, ClassifierReward):
        return load_classifier(options)
    assert isinstance(options, SimilarityReward)
    return load_similarity(options)


def _placed(reward: Classifier | Similarity, wanted: str, budget: DeviceBudget) -> tuple[str, str]:
    """Return the device and why: what the recipe says, else the policy's where the budget is large enough."""
    if wanted != "auto":
        device, reason = detect(wanted).torch_device, PINNED
        if not torch_reaches(device):
            raise UserError(f"device: got {wanted!r}, which this torch ({torch.__version__}) cannot use; take cpu")
    else:
        encoder = reward.encoder
        device, reason = reward_device(encoder.weight_bytes, encoder.work_bytes, budget.device, budget.free_bytes)
        if not torch_reaches(device):
            device, reason = "cpu", f"this torch ({torch.__version__}) cannot use {device}"
    if device == budget.device:
        budget.free_bytes -= reward_bytes(reward.encoder.weight_bytes, reward.encoder.work_bytes, device)
    return device, reason
