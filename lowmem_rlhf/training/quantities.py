"""From what roles did on held-out problems to quantities with one sum and one count a problem (see `intervals`).

Names are those of evaluation.json; ``pass@k`` is added, of which ``accuracy`` is the case k = 1.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowmem_rlhf.training.intervals import Column, pass_at_k

if TYPE_CHECKING:
    from lowmem_rlhf.training.evaluate import Sampled

Value = float | None


def of_completions(sampled: "Sampled", accuracy: str) -> dict[str, Column]:
    """Return accuracy, pass@k, every reward, length and truncation of sampled answers.

    Args:
        sampled: P * G completions.
        accuracy: the reward that says whether an answer is correct.
    """
    g = sampled.samples
    correct = [None if one is None else float(one) for one in sampled.correct(accuracy)]
    totals = [None if one != one else one for one in sampled.scores.total]  # NaN: no reward applies
    return {
        "accuracy": _column(correct, g, share=True),
        **_pass_at(correct, g),
        "reward/mean": _column(totals, g),
        **{f"reward/{name}": _column(values, g) for name, values in sampled.scores.by_name.items()},
        "completion/mean_length": _column([float(len(c.ids)) for c in sampled.completions], g, share=False),
        "completion/truncated": _column([float(c.truncated) for c in sampled.completions], g, share=True),
    }


def of_losses(losses: Sequence[float], tokens: Sequence[int]) -> dict[str, Column]:
    """Return the loss over all learned tokens, from each example's summed loss and number of tokens."""
    return {"loss": Column(np.asarray(losses, dtype=np.float64), np.asarray(tokens, dtype=np.float64))}


def of_pairs(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Column]:
    """Return the share of pairs in the right order, a tie being half, and the scores' difference; both (P,)."""
    difference = (chosen - rejected).double().cpu().numpy()
    right = (difference > 0) + 0.5 * (difference == 0)
    ones = np.ones_like(difference)
    return {"accuracy": Column(right, ones, share=True), "score/margin": Column(difference, ones)}


def ks(samples: int) -> list[int]:
    """Return the k above 1 that pass@k is told for: the powers of two below the number of samples, and that number."""
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return [*powers, samples] if samples > 1 else []


def _pass_at(correct: Sequence[Value], g: int) -> dict[str, Column]:
    """Return pass@k over the problems that have k judged answers."""
    judged = [[one for one in correct[i : i + g] if one is not None] for i in range(0, len(correct), g)]
    columns = {}
    for k in ks(g):
        sums = [pass_at_k(len(one), int(sum(one)), k) if len(one) >= k else 0.0 for one in judged]
        counts = [float(len(one) >= k) for one in judged]
        trials = sum(len(one) // k for one in judged)
        columns[f"pass@{k}"] = Column(np.asarray(sums), np.asarray(counts), share=True, trials=trials)
    return columns


def _column(values: Sequence[Value], g: int, share: bool | None = None) -> Column:
    """Return the column of P * G values; where it is not said, values that are all 0 or 1 make a share."""
    counts = np.asarray([one is not None for one in values], dtype=np.float64).reshape(-1, g)
    numbers = np.asarray([one or 0.0 for one in values], dtype=np.float64).reshape(-1, g)
    share = bool(np.isin(numbers, (0.0, 1.0)).all()) if share is None else share
    return Column(numbers.sum(axis=1), counts.sum(axis=1), share)
