"""Generalised advantage estimation (arXiv 1506.02438), on numbers alone."""

import torch

from lowmem_rlhf.algorithms.common.padded import token_mask, zero_padding


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    gamma: float,
    lam: float,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns (N, L), zeros on the padding.

    ``delta_t = r_t + gamma * V_{t+1} - V_t``, ``A_t = delta_t + gamma * lam * A_{t+1}``, ``R_t = A_t + V_t``.

    Args:
        rewards: (N, L) fp32.
        values: (N, L) fp32, the critic's at the position before each token.
        lengths: (N,) positions that count.
        gamma: discount a token.
        lam: 1 sums up the rewards that follow (Monte Carlo), 0 trusts the next value.
        bootstrap: (N,) value of the state after the last token, for answers that were cut and would have gone on; 0 for
            those that ended. None: 0 for all.

    Raises:
        ValueError: a length outside 1..L.
    """
    mask = token_mask(lengths, rewards.shape[1])
    values = zero_padding(values, mask)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))  # zero after the last token
    if bootstrap is not None:
        following = following.scatter(1, lengths.unsqueeze(1) - 1, bootstrap.to(values.dtype).unsqueeze(1))
    deltas = zero_padding(rewards + gamma * following - values, mask)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):  # still zero when it comes to a row's last token
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values
