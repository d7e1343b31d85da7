"""The dtype that merged weights are stored in: float16 where they fit and the change survives the rounding."""

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.merging.merge import Merge
from lowmem_rlhf.export.rounding import ENOUGH, DoesNotFit, RoundingStats

AUTO = "float16"


def choose_dtype(merge: Merge, wanted: str | None, overflows_float16: bool) -> tuple[str, str]:
    """Return the dtype and the reason; it tries some of the changed layers and writes nothing.

    Args:
        wanted: what the user asked for; None: choose.
        overflows_float16: the model family's activations are known not to fit in float16.

    Raises:
        UserError: what was asked for would lose the change, or a weight does not fit in it.
    """
    if wanted == "float32":
        return wanted, "as --dtype says; no change is rounded away"
    if wanted is None and overflows_float16:
        return "float32", "activations of this model family overflow float16, as which it would be loaded"
    dtype = wanted or AUTO
    try:
        rounding = merge.try_out(dtype)
    except DoesNotFit as error:
        if wanted:
            raise does_not_fit(str(error), dtype) from error
        return "float32", f"{error} does not fit in float16"
    check_rounding(rounding, wanted)
    if wanted:
        return wanted, "as --dtype says"
    if rounding.share < ENOUGH:
        return "float32", (
            f"the change is {rounding.relative_change:.1e} of the weights, of which float16 keeps only "
            f"{rounding.share:.0%}; --dtype float16 takes half the room"
        )
    return "float16", "the weights fit, and the change survives its rounding"


def check_rounding(rounding: RoundingStats, wanted: str | None) -> None:
    """Check that bfloat16 keeps enough of the change.

    Raises:
        UserError: it does not.
    """
    if wanted == "bfloat16" and rounding.share < ENOUGH:
        raise UserError(
            f"--dtype bfloat16 would keep {max(0.0, rounding.share):.0%} of what training changed: the change is "
            f"{rounding.relative_change:.1e} of the weights, and bfloat16 has 8 bits; take float16 or float32 (at "
            f"least {ENOUGH:.0%} must stay)"
        )


def does_not_fit(tensor: str, dtype: str) -> UserError:
    """Return the error of a weight that is too large for the dtype that was asked for."""
    return UserError(f"--dtype {dtype}: {tensor} holds a number that is too large for it; take --dtype float32")
