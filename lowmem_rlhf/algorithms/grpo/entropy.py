"""Entropy in GRPO: the tokens of high entropy that are learned from, and the bonus that keeps it up.

Which tokens are of high entropy is a question to all tokens of a step ("Beyond the 80/20 Rule", arXiv 2506.01939), so a
pass without gradients comes before the update's; TRL compares the tokens of a micro-batch. The bonus and its adaptive
coefficient (Skywork-OR1, arXiv 2505.22312) are TRL's.
"""

import math
from typing import Any

import torch

from lowmem_rlhf.algorithms.grpo.inputs import counted
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.passes import BatchLimits, micro_batches, packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.processes.world import current
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.rollout.rollout import Rollout


@torch.no_grad()
def high_entropy_tokens(
    base: SharedBase,
    rollout: Rollout,
    settings: GRPOSettings,
    limits: BatchLimits,
    progress: ProgressCallback | None = None,
) -> dict[int, torch.Tensor]:
    """Return by row whether each token's entropy is in the top ``top_entropy_quantile`` of all tokens that count.

    The policy is the one at hand; completions without an advantage are compared with, too.
    """
    rows = [row for row, counts in enumerate(counted(rollout, settings)) if counts]
    entropies: dict[int, torch.Tensor] = {}
    with base.role(POLICY):
        for packed in micro_batches(base, rollout.groups(rows), limits.micro_batch_tokens, progress):
            _, values = packed_logprobs(base, packed, limits.temperature, limits.tile)
            entropies.update(zip(packed.rows, values.split(packed.lengths), strict=True))
    entropies = current().rows(entropies, base.device)
    if not entropies:
        return {}
    threshold = torch.quantile(torch.cat(list(entropies.values())), 1 - settings.top_entropy_quantile)
    return {row: values >= threshold for row, values in entropies.items()}


class EntropyCoefficient:
    """The weight of the entropy bonus; it is fixed, or follows the entropy (``use_adaptive_entropy``).

    Attributes:
        value: the coefficient, at first ``entropy_coef``.
        entropy: nats a token at the last optimizer step; infinite before the first.
    """

    def __init__(self, settings: GRPOSettings) -> None:
        self.settings, self.value, self.entropy = settings, settings.entropy_coef, math.inf

    @property
    def applied(self) -> float:
        """What the next optimizer step multiplies the entropy with: nothing while it is above its target."""
        settings = self.settings
        return self.value if not settings.use_adaptive_entropy or self.entropy <= settings.entropy_target else 0.0

    def update(self, entropy: float) -> None:
        """Adapt to the mean entropy of an optimizer step's tokens, in nats; one that is not finite tells nothing."""
        settings = self.settings
        if not settings.use_adaptive_entropy or not math.isfinite(entropy):
            return
        if entropy <= settings.entropy_target:
            self.value = min(self.value + settings.entropy_coef_delta, settings.entropy_coef_max)
        else:
            self.value = max(self.value - settings.entropy_coef_delta, settings.entropy_coef_min)
        self.entropy = entropy

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON has it."""
        return {"value": self.value, "entropy": self.entropy if math.isfinite(self.entropy) else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.value = float(state["value"])
        self.entropy = math.inf if state["entropy"] is None else float(state["entropy"])
