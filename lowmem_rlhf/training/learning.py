"""Whether a run learns: what the first optimizer step must change, and why nothing was learned if nothing was.

A run that trains nothing must not look like one that does: every part that is to train has parameters, a gradient
reaches them, and the first step that teaches something changes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.roles import CRITIC, POLICY
from lowmem_rlhf.recipe.sections import TrainingConfig
from lowmem_rlhf.training.optimizer import Optimizer

Parts = Mapping[str, Sequence[torch.Tensor]]  # by what a sentence calls them: the weights of what has to train


def parts_of(base: SharedBase) -> Parts:
    """Return the weights of each part of a base that has to train.

    The policy's adapter is one, its head another (a reward model's), a critic's adapter with its head the third: where
    the critic shares the policy's adapter, its head alone.
    """
    parameters = {name: p for name, p in base.named_parameters() if p.requires_grad}
    adapter = [p for name, p in parameters.items() if f".{POLICY}." in name and not name.startswith("heads.")]
    parts = {"adapter": adapter}
    if POLICY in base.heads:
        parts["score head"] = [p for name, p in parameters.items() if name.startswith(f"heads.{POLICY}.")]
    if CRITIC in base.heads:
        parts["critic"] = [p for name, p in parameters.items() if f".{CRITIC}." in name]
    return parts


def sums(parts: Parts) -> dict[str, float]:
    """Return for each part a number that any usual change of its weights changes."""
    return {part: sum(float(p.detach().cpu().double().abs().sum()) for p in own) for part, own in parts.items()}


def unchanged(before: dict[str, float], after: dict[str, float], metrics: dict[str, Any]) -> str:
    """Return what a run says whose first step left a part as it was; empty where all have changed.

    Args:
        before, after: of `sums`.
        metrics: of the step.
    """
    still = [part for part, value in before.items() if after[part] == value]
    if not still:
        return ""
    why = " (the gradient was exactly 0)" if metrics.get("grad_norm") == 0 else ""
    return (
        f"the first optimizer step did not change the {' and the '.join(still)}{why}: nothing would be learned; see "
        "that training.learning_rate is not too small for float32, and that a loss of your own keeps its gradient"
    )


def no_gradient(error: BaseException) -> str | None:
    """Return what a run says whose loss no weight had a part in, if this error tells of that."""
    if "does not require grad" not in str(error):
        return None
    return (
        "the loss has no gradient, so nothing would be learned: no weight that trains took part in it; see that a loss "
        "of your own is not detached from the log-probs that it is given, and that the adapter trains"
    )


def warm_up_remark(training: TrainingConfig, total_steps: int) -> str:
    """Return what is worth saying of a warm-up that does not end within the run; empty where it does.

    Args:
        total_steps: optimizer steps of the whole run.
    """
    warmup = training.warmup_steps
    if training.lr_scheduler_type == "constant" or not warmup or warmup < total_steps or not total_steps:
        return ""
    most = training.learning_rate * (total_steps - 1) / warmup
    return (
        f"training.warmup_steps={warmup} is no less than the run's {total_steps} optimizer steps: the learning rate "
        f"never gets beyond {most:.3g}, of {training.learning_rate:g}; lower the one or raise training.max_steps"
    )


class LostTokens:
    """Tokens that had something to teach in steps that changed nothing, counted by what was in the way."""

    def __init__(self, training: TrainingConfig, optimizer: Optimizer) -> None:
        self.training, self.optimizer = training, optimizer
        self.left_out = 0  # in steps with a number that was not finite
        self.without_rate = 0  # at a learning rate of zero

    def add(self, tokens: int, left_out: bool) -> None:
        """Count the tokens of a step from which nothing was learned."""
        if left_out:
            self.left_out += tokens
        else:
            self.without_rate += tokens

    def why(self) -> str:
        """Return why a run learned nothing, where tokens were lost; empty where there were none."""
        if self.left_out:
            return f"nothing was learned: optimizer steps were left out; {self.optimizer.why_left_out()}"
        if self.without_rate:
            return (
                "nothing was learned: the learning rate was 0 in every step that had something to teach "
                f"(training.warmup_steps={self.training.warmup_steps}, {self.training.lr_scheduler_type}, "
                f"{self.optimizer.total_steps} optimizer steps); lower training.warmup_steps or raise "
                "training.max_steps"
            )
        return ""

    def state(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {"left_out": self.left_out, "without_rate": self.without_rate}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from what `state` gave; an empty one is of an older checkpoint."""
        self.left_out, self.without_rate = state.get("left_out", 0), state.get("without_rate", 0)
