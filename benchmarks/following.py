"""What the bounded rank of a reference that follows the policy costs: its distance from the exact mix.

    python benchmarks/following.py [--steps 48] [--every 6] [--alpha 0.6] [--model M] [--json]

A model's adapter of rank 16 learns the text of this repository's documentation, 511 tokens a step. Every so many steps
the policy is mixed into references of 1, 2 and 4 times its rank, by what a run does it with (`engine.following`), and
into an exact one, whose rank grows by 16 each time. Told are, of all layers together, the norm of what the last mixing
cut off over that of the whole, and the norm of the difference from the exact change over that of the change.
"""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from twins import SMOLLM2
from work import ROOT

RANK, TOKENS = 16, 512
MULTIPLES = (1, 2, 4)
PAGES = ("stages", "engine", "data", "plan", "rewards")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--every", type=int, default=6, help="steps from one mixing to the next")
    parser.add_argument("--alpha", type=float, default=0.6)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--json", action="store_true")
    return parser


Factors = list[tuple[Any, Any]]  # A (n, in) and B (out, n) of each layer


def mixed(reference: Factors | None, policy: Factors, alpha: float, rank: int | None) -> tuple[Factors, float]:
    """Return the next reference, and the share that was cut off to stay at a rank; None: nothing is."""
    import torch

    from lowmem_rlhf.engine.following import nearest

    found, lost, whole = [], 0.0, 0.0
    for (a_ref, b_ref), (a, b) in zip(reference or [(a[:0], b[:, :0]) for a, b in policy], policy, strict=True):
        a, b = torch.cat([a_ref, a]), torch.cat([(1 - alpha) * b_ref, alpha * b], dim=1)
        if rank is not None and len(a) > rank:
            a, b, cut, total = nearest(a, b, rank)
            lost, whole = lost + float(cut), whole + float(total)
        found.append((a, b))
    return found, math.sqrt(lost / whole) if whole else 0.0


def norm(factors: Factors) -> float:
    """Return the Frobenius norm of all layers' products, from the Gram matrices of their factors in fp64."""
    total = 0.0
    for a, b in factors:
        a, b = a.double(), b.double()
        total += float(((b.t() @ b) * (a @ a.t())).sum())
    return math.sqrt(max(total, 0.0))


def measure(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train, mix, and return what was lost by multiple."""
    import torch

    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.engine.packing import Group
    from lowmem_rlhf.engine.passes import packed_logprobs
    from lowmem_rlhf.engine.roles import POLICY

    device = torch.device("cpu")
    base = SharedBase.load(given.model, device, "none", "float32", r=RANK, lora_alpha=2 * RANK)
    parameters = list(base.trainable().values())
    optimizer = torch.optim.AdamW(parameters, given.learning_rate)
    ids = base.tokenizer("".join((ROOT / "docs" / f"{page}.md").read_text() for page in PAGES))["input_ids"]
    references: dict[int | None, Factors | None] = dict.fromkeys((*MULTIPLES, None))
    cut: dict[int | None, float] = {}
    for step in range(given.steps):
        text = ids[(at := step * TOKENS % (len(ids) - TOKENS)) : at + TOKENS]
        with base.role(POLICY):
            packed = base.layout.lay_out([Group(text[:1], [text[1:]], [0])], device)
            (-packed_logprobs(base, packed, 1.0, 64, entropy="none")[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        base.adapters_changed()
        if (step + 1) % given.every == 0:
            layers = [(*layer.masters(POLICY), layer.scaling[POLICY]) for layer in base.adapter_layers()]
            policy = [(a.detach().clone(), scaling * b.detach()) for a, b, scaling in layers]
            for times, reference in references.items():
                rank = None if times is None else times * RANK
                references[times], cut[times] = mixed(reference, policy, given.alpha, rank)
    exact = references[None] or []
    found = {}
    for times in MULTIPLES:
        pairs = zip(exact, references[times] or [], strict=True)
        apart = [(torch.cat([a, c]), torch.cat([b, -d], dim=1)) for (a, b), (c, d) in pairs]
        found[str(times)] = {"lost": cut[times], "distance": norm(apart) / norm(exact)}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    given = options().parse_args(arguments)
    found = measure(given)
    if given.json:
        print(json.dumps(found, indent=2))
        return
    for times, row in found.items():
        print(f"{times} times rank {RANK}: lost {row['lost']:.2e}, distance from the exact mix {row['distance']:.2e}")


if __name__ == "__main__":
    main()
