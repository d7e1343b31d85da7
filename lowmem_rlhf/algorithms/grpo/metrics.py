"""What an update of GRPO tells: its rows of metrics.jsonl."""

from typing import Any

import torch

from lowmem_rlhf.algorithms.grpo.inputs import sampling_correction
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.grpo.update import UpdateStats
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.training.metrics import sampling_difference


def update_metrics(rollout: Rollout, stats: UpdateStats, settings: GRPOSettings) -> dict[str, Any]:
    """Return what the update measured; KL, entropy and difference are means over tokens, before the update."""
    return {
        "kl": stats.kl / stats.kl_tokens if stats.kl_tokens else None,
        "entropy": stats.entropy / stats.scored if stats.scored else None,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        **_ratios(stats, settings),
        "tokens/trained": stats.tokens,
        "sampling/logp_difference": sampling_difference(rollout, stats.logps),
        **_correction(rollout, stats.logps, settings),
    }


def _ratios(stats: UpdateStats, settings: GRPOSettings) -> dict[str, float]:
    """Return what is told of ratios and masks, over all iterations, under TRL's names where it has one."""
    by_sequence = settings.importance_sampling_level == "sequence"
    ratios = max(stats.clip_completions if by_sequence else stats.clip_tokens, 1)
    low, high = stats.clipped_low / ratios, stats.clipped_high / ratios
    of_loss: dict[str, dict[str, float]] = {
        "cispo": {"cispo_clip_ratio": high},
        "sapo": {},
        "vespo": {"vespo/phi_seq_mean": stats.phi_seq / max(stats.clip_completions, 1)},
    }
    found = of_loss.get(settings.loss_type, {"clip_ratio/low": low, "clip_ratio/high": high})
    if settings.leave_out:
        found["policy/left_out"] = stats.left_out / max(stats.clip_tokens, 1)
    return found


def _correction(rollout: Rollout, logps: dict[int, torch.Tensor], settings: GRPOSettings) -> dict[str, float | None]:
    """Return mean and extremes of the importance weights over tokens (completions with a mode of sequences), if any."""
    if not settings.importance_sampling_correction:
        return {}
    by_sequence = settings.importance_sampling_mode.startswith("sequence")
    by_row = [sampling_correction(rollout, [row], old, settings) for row, old in logps.items()]
    weighed = [values[:1] if by_sequence else values for values in by_row if values is not None]
    name = "sampling/importance_sampling_ratio"
    if not weighed:
        return {f"{name}/{kind}": None for kind in ("min", "mean", "max")}
    weights = torch.cat(weighed)
    return {
        f"{name}/{kind}": float(value)
        for kind, value in (("min", weights.min()), ("mean", weights.mean()), ("max", weights.max()))
    }
