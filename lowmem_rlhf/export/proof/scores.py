"""A reward model compared with stock transformers and peft: the same adapter and head must score alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lowmem_rlhf.architecture.adapters import HEAD
from lowmem_rlhf.engine.load import DTYPES
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.proof.outputs import PolicyOutputs, in_float32, is_exact
from lowmem_rlhf.export.proof.stock import ARITHMETIC, EXACT_ARITHMETIC, stock_adapter

# of the largest score, as `compare` has it of KL: with fp32 arithmetic, with 16 bits, and where fp32 has no room
EXACT, ROUNDED, UNMEASURED = 1e-3, 0.01, 0.1
TIMES = 4.0  # what 16-bit arithmetic does to the stock scores


@torch.no_grad()
def proof_of_scores(
    folder: Path, live: PolicyOutputs, device: torch.device, settings: dict[str, Any]
) -> dict[str, Any]:
    """Compare the scores of a reward model's adapter in stock peft, with its head, with the live ones.

    As in `compare_with_stock`: with fp32 arithmetic where there is room, and in the run's dtype.

    Raises:
        RunError: it cannot be loaded, or scores otherwise.
    """
    head = load_file(folder / HEAD, device=str(device))
    assert live.scores is not None
    dtype, verdicts = settings["compute_dtype"], []
    with stock_adapter(folder, live.recipe, device, settings) as model:
        scores = _stock_scores(model, head, live.ids)
        exact = live.exact_scores is not None and in_float32(model, DTYPES[dtype], device)
        wide = _stock_scores(model, head, live.ids) if exact and not is_exact(settings) else scores
    if exact and live.exact_scores is not None:
        verdicts.append(_check_scores(wide, live.exact_scores, EXACT_ARITHMETIC, EXACT, 0.0))
    if not is_exact(settings):
        off = TIMES * float((wide - scores).abs().max())
        share = ROUNDED if exact else UNMEASURED
        verdicts.append(_check_scores(scores, live.scores, ARITHMETIC.format(dtype), share, off))
    return {
        "compared_on": live.source,
        "texts": len(scores),
        "largest_score_difference": verdicts[0]["largest_score_difference"],
        "score_std": float(live.scores.std(correction=0)),
        "judged": verdicts,
    }


def _stock_scores(model: Any, head: dict[str, torch.Tensor], ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return a score for each sequence, (N,): the head on a stock model's last hidden state at the last token."""
    scores = []
    for one in ids:
        inputs = torch.tensor([one], dtype=torch.long, device=model.device)
        states = model(input_ids=inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
        scores.append(F.linear(states[0, -1].float(), head["weight"], head.get("bias")).cpu())
    return torch.cat(scores)


def _check_scores(stock: torch.Tensor, live: torch.Tensor, arithmetic: str, share: float, off: float) -> dict[str, Any]:
    """Check that the live scores equal stock's up to a share of the largest one, and to what rounding is known to do.

    Raises:
        RunError: they are not.
    """
    difference, allowed = float((stock - live).abs().max()), share * float(stock.abs().max()) + off
    if not difference <= allowed:
        raise RunError(
            f"the reward model in stock transformers and peft, {arithmetic}, scores up to {difference:.2g} otherwise "
            f"than the live one (at most {allowed:.2g} is rounding; its scores have a standard deviation of "
            f"{float(live.std(correction=0)):.2g}); nothing was kept"
        )
    return {
        "what": "the live reward model",
        "against": f"its adapter and head in stock transformers and peft, {arithmetic}",
        "largest_score_difference": difference,
        "largest_score_difference_at_most": allowed,
    }
