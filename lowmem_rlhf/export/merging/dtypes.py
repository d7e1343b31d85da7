"""In which dtype merged weights are stored: float16 where they fit and the change survives its rounding."""

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.merging.merge import Merge
from lowmem_rlhf.export.rounding import ENOUGH, DoesNotFit, Kept

AUTO = "float16"


def choose_dtype(merge: Merge, wanted: str | None, overflows_float16: bool) -> tuple[str, str]:
    """Return the dtype and the reason; some of the changed layers are tried out, nothing is written.

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
        kept = merge.try_out(dtype)
    except DoesNotFit as error:
        if wanted:
            raise does_not_fit(str(error), dtype) from error
        return "float32", f"{error} does not fit in float16"
    check_kept(kept, wanted)
    if wanted:
        return wanted, "as --dtype says"
    if kept.share < ENOUGH:
        return "float32", (
            f"the change is {kept.relative_change:.1e} of the weights, of which float16 keeps only {kept.share:.0%}; "
            "--dtype float16 takes half the room"
        )
    return "float16", "the weights fit, and the change survives its rounding"


def check_kept(kept: Kept, wanted: str | None) -> None:
    """Check that bfloat16 keeps enough of the change.

    Raises:
        UserError: it does not.
    """
    if wanted == "bfloat16" and kept.share < ENOUGH:
        raise UserError(
            f"--dtype bfloat16 would keep {max(0.0, kept.share):.0%} of what training changed: the change is "
            f"{kept.relative_change:.1e} of the weights, and bfloat16 has 8 bits; take float16 or float32 (at least "
            f"{ENOUGH:.0%} must stay)"
        )


def does_not_fit(tensor: str, dtype: str) -> UserError:
    """Return the error of a weight that is too large for the dtype that was asked for."""
    return UserError(f"--dtype {dtype}: {tensor} holds a number that is too large for it; take --dtype float32")
