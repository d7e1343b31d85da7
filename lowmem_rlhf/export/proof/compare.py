"""How two models' predictions compare: KL, likeliest tokens, the share of the change kept, and the bounds on them.

A bound is absolute: it never depends on how far training went, only on what rounding explains. That is computed for
each model (`export.proof.stock`), since models differ by a factor of a thousand in their sensitivity to rounding.

Shapes: T positions (all of the sequences, one after another), V vocabulary. Logits are fp32.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.rounding import LOST

# Nats a token that two orders of fp32 sums may differ by. Ours and stock's differed by at most 2e-8 in 24 tiny
# architectures with mild and with extreme weights (norms of -6 to 90), so even a small fault of a model stands out.
EXACT = 1e-5
# Two models that round in 16 bits, beside `TIMES` what rounding does to one of them. Both are off by about as much as
# the one that is measured, independently at worst, so their distance is twice it; measured at most 2.7 times. int8,
# whose outliers depend on what else is in a pass, was 1e-4 apart where rounding alone explains 2e-6.
ROUNDED, TIMES = 1e-3, 4.0
# A right export beside what storing its numbers explains. For a dtype the rounding is done and not drawn: measured 0.9
# to 1.1 times that. Kinds of blocks are drawn and have `TIMES`: 0.4 to 2.0 (five tiny architectures, SmolLM2-135M).
STORED_TIMES = 2.0
# the same, by dtype or kind of GGUF, where there is no room for fp32 arithmetic to tell what rounding does to a model
UNMEASURED = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 5e-2}
UNMEASURED |= {"q8_0": 5e-2, "q6_k": 0.1, "q5_k_m": 0.2, "q4_k_m": 0.5}
# Share of the likeliest tokens that near ties may turn over, some tokens whatever the number, and how often the share
# that rounding turns over itself.
TURNED, FEW, TURNED_TIMES = 0.05, 3, 3.0


@dataclass(frozen=True)
class Comparison:
    """An export beside the live policy and the base that both stand on.

    Attributes:
        mean_kl: of the live policy to the export, nats a token.
        top1_agreement: share of positions with the same likeliest token.
        base_kl: mean KL of the live policy to its base: what there is to lose.
        kept: the export's change of the base's log-probs, projected on the live policy's; 1 means all of it. It is
            weighted with the live policy's probabilities, so that small changes count as they do in KL.
        uncertainty: two standard errors of `kept`.
        tokens: positions.
    """

    mean_kl: float
    top1_agreement: float
    base_kl: float
    kept: float
    uncertainty: float
    tokens: int

    def facts(self) -> dict[str, float]:
        """Return what export.json tells of it."""
        return {
            "tokens": self.tokens,
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1_agreement,
            "kl_of_live_policy_to_its_base": self.base_kl,
        }

    def within(self, bound: "Bound") -> bool:
        """Whether both are the same model up to the bound; false where a number is not finite."""
        return self.mean_kl <= bound.mean_kl and self.top1_agreement >= bound.top1_agreement

    def verdict(self, what: str, against: str, bound: "Bound") -> dict[str, Any]:
        """Return an entry of export.json's ``judged``: both models, how far apart they are, and the bound."""
        return {
            "what": what,
            "against": against,
            "mean_kl": self.mean_kl,
            "mean_kl_at_most": bound.mean_kl,
            "top1_agreement": self.top1_agreement,
            "top1_agreement_at_least": bound.top1_agreement,
        }

    def check(self, what: str, against: str, bound: "Bound") -> dict[str, Any]:
        """Check that an export is the model that it is of, and return the `verdict`.

        Raises:
            RunError: it has lost the change, or is another model.
        """
        if not math.isfinite(self.mean_kl):
            raise RunError(
                f"{what}, loaded again, gives numbers that are not finite: its activations overflow in this dtype; "
                "take --dtype float32"
            )
        if self.kept + self.uncertainty < LOST:
            raise RunError(
                f"{what} has lost what training changed: of the change in the predictions {self.kept:.0%} is left "
                f"(KL to {against} {self.mean_kl:.2g}, of that to its base {self.base_kl:.2g}); nothing was kept"
            )
        if not self.within(bound):
            raise RunError(
                f"{what}, loaded again, is not {against}: {self.differ(bound)}; what it is stored as does not explain "
                "that. Nothing was kept"
            )
        return self.verdict(what, against, bound)

    def differ(self, bound: "Bound") -> str:
        """Return the difference and the bound in words."""
        return (
            f"their mean KL is {self.mean_kl:.2g} nats a token (at most {bound.mean_kl:.2g}), their likeliest token "
            f"the same at {self.top1_agreement:.1%} (at least {bound.top1_agreement:.1%})"
        )


@dataclass(frozen=True)
class Bound:
    """How far apart two ways to compute one model may be: nats a token, and share of the same likeliest tokens."""

    mean_kl: float
    top1_agreement: float


def bound(tokens: int, explained: Iterable[Comparison] = (), least: float = EXACT, times: float = TIMES) -> Bound:
    """Return the bound for two models between which there is what these comparisons show, on so many tokens.

    Args:
        explained: what is known to differ, each measured with a model that is right.
        least: mean KL that is always allowed.
        times: how often what is known may differ.
    """
    kl, turned = least, TURNED + FEW / tokens + (least / 2) ** 0.5  # Pinsker: what this KL may move in probability
    for one in explained:
        kl += times * max(0.0, one.mean_kl)
        turned += TURNED_TIMES * (1 - one.top1_agreement)
    return Bound(kl, max(0.0, 1 - turned))


@torch.no_grad()
def compare(
    live: Iterable[torch.Tensor],
    base: Iterable[torch.Tensor],
    export: Iterable[torch.Tensor],
) -> Comparison:
    """Compare the logits of three models, given as pieces of a few positions (.., V) each."""
    kl = base_kl = 0.0
    same = tokens = 0
    along: list[torch.Tensor] = []  # of each position: the export's change along the live one, and that squared
    squared: list[torch.Tensor] = []
    for one, two, three in zip(live, base, export, strict=True):
        live_logps, base_logps, export_logps = (logits.float().log_softmax(-1) for logits in (one, two, three))
        p = live_logps.exp()
        change = live_logps - base_logps
        kl += float((p * (live_logps - export_logps)).sum())
        base_kl += float((p * change).sum())
        along.append((p * change * (export_logps - base_logps)).sum(-1))
        squared.append((p * change * change).sum(-1))
        same += int((one.argmax(-1) == three.argmax(-1)).sum())
        tokens += one.shape[0]
    n, d = torch.cat(along).double(), torch.cat(squared).double()
    total = float(d.sum())
    kept = float(n.sum()) / total if total else 1.0
    spread = float((n - kept * d).square().sum().sqrt()) / total if total else 0.0
    return Comparison(kl / tokens, same / tokens, base_kl / tokens, kept, 2 * spread, tokens)
