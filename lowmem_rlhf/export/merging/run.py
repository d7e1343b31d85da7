"""A run's adapter merged into its base's files, with the dtype chosen on the way, and the proof of the result."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.architecture.families import family_of
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.bar import bar
from lowmem_rlhf.export.framing import end_turns, keep_template_options
from lowmem_rlhf.export.merging.dtypes import check_kept, choose_dtype, does_not_fit
from lowmem_rlhf.export.merging.lora_file import LoraFile
from lowmem_rlhf.export.merging.merge import Merge
from lowmem_rlhf.export.merging.names import skeleton
from lowmem_rlhf.export.proof import verify
from lowmem_rlhf.export.proof.live import Live, live_policy
from lowmem_rlhf.export.proof.stock import Reference, as_live, hold, is_stored_as_computed, on_original
from lowmem_rlhf.export.rounding import LOST, DoesNotFit, Kept
from lowmem_rlhf.export.shards import read_shards
from lowmem_rlhf.export.source import base_folder, copy_side_files, write_config
from lowmem_rlhf.export.wish import ORIGINAL, QUANTIZED, check_disk

if TYPE_CHECKING:
    from lowmem_rlhf.export.export import Export

HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Merged:
    """Merged weights in a folder.

    Attributes:
        dtype, reason: how they are stored, and why.
        kept: of the change.
        live: what the live policy said, for the proof.
        judged: that held against stock.
        reference: what the export is held against; None where there is no room for it.
        notes: what is said of the folder's other files.
    """

    export: "Export"
    folder: Path
    dtype: str
    reason: str
    kept: Kept
    live: Live
    judged: list[dict[str, Any]]
    reference: Reference | None
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what export.json says of the merge."""
        return {
            "onto": QUANTIZED if self.export.onto_quantized else ORIGINAL,
            "base_quantization": self.export.settings["quantization"],
            "dtype": self.dtype,
            "dtype_reason": self.reason,
            "relative_change": self.kept.relative_change,
            "notes": list(self.notes),
        }

    def proof(self) -> dict[str, Any]:
        """Load the folder again and compare it with what it reproduces.

        Raises:
            RunError: it has lost the adapter, or is another model.
        """
        proof = verify.proof_of_merged(
            self.folder, self.live, self.judged, self.reference, self.dtype, self.export.device
        )
        return proof | {"kept_share": self.kept.share}


def merge_run(export: "Export", folder: Path, wanted: str | None) -> Merged:
    """Merge a run's adapter into its base, into a folder that others load.

    Args:
        wanted: the dtype that was asked for; None: choose.

    Raises:
        UserError, RunError: see `Export.make`.
    """
    recipe, settings = export.recipe, export.settings
    source = base_folder(recipe.model, recipe.revision)
    quantization = settings["quantization"] if export.onto_quantized else "none"
    model = skeleton(source, quantization, settings["compute_dtype"], recipe.trust_remote_code)
    adapter = LoraFile(saved_adapter(str(export.adapter), recipe.model, recipe.revision))
    merge = Merge(read_shards(source), model, adapter, settings["compute_dtype"], export.device)
    dtype, reason = choose_dtype(merge, wanted, family_of(model.model_type).overflows_float16)
    live = live_policy(export.opened, export.wish.device)
    judged, reference = _references(live, export, dtype)
    try:
        kept = _write(merge, folder, dtype, export)
    except DoesNotFit as error:
        if wanted:
            raise does_not_fit(str(error), dtype) from error
        dtype, reason = "float32", f"{error} does not fit in float16"
        print(f"{reason}; merging again as {dtype}", file=sys.stderr, flush=True)
        kept = _write(merge, folder, dtype, export)
    check_kept(kept, wanted)
    if kept.share < LOST:
        raise RunError(
            f"{dtype} keeps only {max(0.0, kept.share):.0%} of what training changed ({kept.relative_change:.1e} of "
            "the weights), so the export would be the base; take --dtype float32. Nothing was kept"
        )
    write_config(source, folder, dtype)
    copy_side_files(source, folder)
    options = keep_template_options(folder, recipe.data.chat_template_kwargs)
    notes = options + end_turns(folder)  # with the options as its defaults
    return Merged(export, folder, dtype, reason, kept, live, judged, reference, notes)


def _references(live: Live, export: "Export", dtype: str) -> tuple[list[dict[str, Any]], Reference | None]:
    """Hold the live policy against stock, and return what the export is to be held against.

    On other numbers than the run computed with, predictions differ by the base's quantization, so the export is held
    against the adapter on these.

    Raises:
        RunError: the live policy is not stock's.
    """
    kinds = [kind for kind in (dtype, export.wish.quantize) if kind in (*HALVES, "q8_0", "q4_k_m")]
    if export.onto_quantized or is_stored_as_computed(export.recipe, export.settings):
        held = hold(live, export.adapter, export.device, export.settings, kinds)
        return held.judged, as_live(live, held)
    judged = hold(live, export.adapter, export.device, export.settings).judged
    return judged, on_original(live, export.adapter, export.device, kinds)


def _write(merge: Merge, folder: Path, dtype: str, export: "Export") -> Kept:
    check_disk(merge.written_bytes(dtype), export.target)
    with bar(f"merging as {dtype}") as moved:
        return merge.write(folder, dtype, moved)
