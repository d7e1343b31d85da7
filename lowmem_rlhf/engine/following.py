"""A reference that follows the policy: an adapter of bounded rank into which the policy's is mixed now and then.

TR-DPO (arXiv 2404.09656) moves a reference by ``W_ref <- (1 - alpha) W_ref + alpha W``, TRL's `SyncRefModelCallback`.
Here both are one frozen base and a change of low rank, so the same is done to the changes alone, each a product of two
factors: ``D_ref <- (1 - alpha) D_ref + alpha D``. The sum of two products is the product of stacked factors,

    B = [(1 - alpha) B_ref, alpha scaling B_policy]    A = [A_ref; A_policy],

whose rank grows by the policy's every time. (To mix A and B each by itself is something else: it adds ``B_ref
A_policy`` and ``B_policy A_ref``.) Once the adapter's rank is used up, the stacked product is replaced by the nearest
one of that rank in the Frobenius norm (Eckart and Young 1936): a QR of both factors and the SVD of the small matrix
between them. What is cut off was mixed in long ago, so its weight is small, or lies in directions that policies share.

The factors are fp32, unlike a frozen start's: 16-bit ones would be rounded again at every mixing. Shapes: r the
policy's rank beside a layer, R the reference's, n = R + r, ``in`` and ``out`` features.
"""

import math

import torch

from lowmem_rlhf.engine.roles import POLICY, REFERENCE, Roles


@torch.no_grad()
def mix_into_reference(base: Roles, alpha: float, mixed: int) -> float:
    """Let the reference be ``1 - alpha`` times itself and ``alpha`` times the policy, beside every layer.

    Args:
        base: with a reference that follows (`Roles.add_following`).
        alpha: above 0; 1 copies the policy.
        mixed: adapters of the policy's rank that it was mixed from so far; each took that much of its own rank, until
            none was left.

    Returns:
        The share of the sum that did not fit into the rank: the Frobenius norm of what was cut off over that of the
        whole, of all layers together. The host waits for it.
    """
    lost, whole = (torch.zeros((), dtype=torch.float32, device=base.device) for _ in range(2))
    for layer in base.adapter_layers():
        a_ref, b_ref = layer.masters(REFERENCE)  # (R, in), (out, R)
        a, b = layer.masters(POLICY)  # (r, in), (out, r)
        rank, used = len(a), 0 if alpha == 1 else mixed * len(a)
        b = b * (alpha * layer.scaling[POLICY])
        if used + rank <= len(a_ref):
            b_ref.mul_(1 - alpha)
            a_ref[used : used + rank].copy_(a)
            b_ref[:, used : used + rank].copy_(b)
            continue
        nearest_a, nearest_b, cut, total = nearest(
            torch.cat([a_ref, a]), torch.cat([b_ref * (1 - alpha), b], 1), len(a_ref)
        )
        a_ref.zero_()[: len(nearest_a)].copy_(nearest_a)
        b_ref.zero_()[:, : len(nearest_a)].copy_(nearest_b)
        lost += cut
        whole += total
    base.adapters_changed()
    return math.sqrt(float(lost / whole.clamp(min=torch.finfo(torch.float32).tiny)))


def nearest(
    a: torch.Tensor, b: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return factors of the product nearest to ``b a`` of at most a rank, and the squared norms of the rest and of all.

    Args:
        a, b: (n, in) and (out, n) fp32.

    Returns:
        A (k, in) and B (out, k) with k the least of ``rank``, n, in and out, and two numbers. Each singular value is
        split evenly between A and B, so that the 16-bit copies of both are of one size.
    """
    q_in, r_in = torch.linalg.qr(a.t())  # (in, n), (n, n)
    q_out, r_out = torch.linalg.qr(b)
    u, s, v = torch.linalg.svd(r_out @ r_in.t(), full_matrices=False)
    root, squares = s[:rank].sqrt(), s.square()
    new_a = (q_in @ v[:rank].t()).mul_(root).t()
    new_b = (q_out @ u[:, :rank]).mul_(root)
    return new_a, new_b, squares[rank:].sum(), squares.sum()
