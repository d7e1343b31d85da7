"""How an export's predictions compare with the live policy's: KL, likeliest tokens, and the share of the change kept.

Shapes: T positions (all of the sequences, one after another), V vocabulary. Logits are fp32.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.rounding import LOST

NOISE = 0.05  # nats a token: two precisions of one model (int8's products above all) never differ by more


@dataclass(frozen=True)
class Comparison:
    """An export beside the live policy and the base that both stand on.

    Attributes:
        mean_kl: of the live policy to the export, nats a token.
        top1_agreement: share of positions with the same likeliest token.
        base_kl: mean KL of the live policy to its base: what there is to lose.
        kept: the export's change of the base's log-probs, projected on the live policy's; 1: all of it. It is weighted
            with the live policy's probabilities, so that small changes are counted as KL counts them.
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
        """Return what is told of it."""
        return {
            "tokens": self.tokens,
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1_agreement,
            "kl_of_live_policy_to_its_base": self.base_kl,
        }

    def check(self, what: str) -> None:
        """Check that the export does what the live policy does.

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
                f"(KL to the live policy {self.mean_kl:.2g}, of that to its base {self.base_kl:.2g}); nothing was kept"
            )
        if self.mean_kl > max(NOISE, self.base_kl):
            raise RunError(
                f"{what}, loaded again, is not the trained policy: its KL to it is {self.mean_kl:.2g}, that of the "
                f"untrained base {self.base_kl:.2g}; nothing was kept"
            )


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
