"""What the proof of an export says, in one sentence. No torch here."""

from typing import Any

from lowmem_rlhf.display.format import number
from lowmem_rlhf.export.options import ORIGINAL

NOTHING = 0.02  # of the change in the predictions: less is rounding
_FRACTIONS = {"A quarter": 1 / 4, "A third": 1 / 3, "Half": 1 / 2, "Two thirds": 2 / 3, "Three quarters": 3 / 4}
_NEAR = 0.04  # of a fraction that is named


def in_words(facts: dict[str, Any]) -> str:
    """Return how much of what was learned is in an export, and how its answers differ from the live policy's.

    Args:
        facts: what export.json holds.
    """
    proof = facts.get("proof") or {}
    kept = number(proof.get("gguf_kept_in_predictions", proof.get("kept_in_predictions")))
    stored = facts.get("quantize") or facts.get("dtype")
    if kept is not None:
        said = f"{_lost(1 - kept, stored)}."
    elif any("largest_score_difference" in one for one in proof.get("judged") or ()):
        said = "Nothing of what was learned is lost: it gives the run's scores."
    else:
        said = "How much of what was learned is lost could not be measured here."
    if facts.get("onto") != ORIGINAL or facts.get("base_quantization", "none") == "none":
        return said
    agreement = number(proof.get("gguf_top1_agreement", proof.get("top1_agreement")))
    same = "" if agreement is None else f"; the likeliest next word is the same in {agreement:.0%} of all places"
    return (
        f"{said} It stands on the original weights and not on the quantized ones that the run trained on, so its "
        f"answers are not word for word those of the live policy{same}."
    )


def _lost(share: float, stored: str | None) -> str:
    if share <= NOTHING:
        return "Nothing of what was learned is lost"
    name, fraction = min(_FRACTIONS.items(), key=lambda one: abs(one[1] - share))
    named = name if abs(fraction - share) <= _NEAR else f"{share:.0%}"
    return f"{named} of what was learned is lost" + (f", as its numbers are stored in {stored}" if stored else "")
