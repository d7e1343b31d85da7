"""A run's adapter merged into its base's files, with the dtype chosen on the way, and the proof of the result."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export import verify
from lowmem_rlhf.export.bar import bar
from lowmem_rlhf.export.dtypes import check_kept, choose_dtype, does_not_fit
from lowmem_rlhf.export.live import Live, Said, live_policy, with_original
from lowmem_rlhf.export.lora_file import LoraFile
from lowmem_rlhf.export.merge import Merge
from lowmem_rlhf.export.names import skeleton
from lowmem_rlhf.export.rounding import LOST, DoesNotFit, Kept
from lowmem_rlhf.export.shards import read_shards
from lowmem_rlhf.export.source import base_folder, copy_side_files, write_config
from lowmem_rlhf.export.wish import ORIGINAL, QUANTIZED, check_disk
from lowmem_rlhf.model.adapters import saved_adapter
from lowmem_rlhf.planning.families import FAMILIES

if TYPE_CHECKING:
    from lowmem_rlhf.export.export import Export


@dataclass(frozen=True)
class Merged:
    """Merged weights in a folder.

    Attributes:
        dtype, reason: how they are stored, and why.
        kept: of the change.
        live: what the live policy said, for the proof.
    """

    export: "Export"
    folder: Path
    dtype: str
    reason: str
    kept: Kept
    live: Live

    def facts(self) -> dict[str, Any]:
        """Return what export.json says of the merge."""
        return {
            "onto": QUANTIZED if self.export.onto_quantized else ORIGINAL,
            "base_quantization": self.export.settings["quantization"],
            "dtype": self.dtype,
            "dtype_reason": self.reason,
            "relative_change": self.kept.relative_change,
        }

    def proof(self) -> dict[str, Any]:
        """Load the folder again and compare it with the live policy.

        On the original weights the predictions also differ by the base's quantization, so the change is looked for
        against the adapter on these weights.

        Raises:
            RunError: it has lost the adapter, or is another model.
        """
        live, export = self.live, self.export
        with verify.stock_model(self.folder, export.device, live.recipe.trust_remote_code) as model:
            logits = verify.stock_logits(model, live.ids)
        same_base: Said | None = live.exact or live.said
        if not export.onto_quantized and export.settings["quantization"] != "none":
            same_base = with_original(live, export.adapter, export.device)
        return verify.proof_of_logits(live, logits, same_base, "the merged model") | {"kept_share": self.kept.share}


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
    adapter = LoraFile(saved_adapter(str(export.adapter), recipe.model))
    merge = Merge(read_shards(source), model, adapter, settings["compute_dtype"], export.device)
    family = FAMILIES.get(model.model_type)
    dtype, reason = choose_dtype(merge, wanted, family is not None and family.overflows_float16)
    live = live_policy(export.run, export.wish.step, export.wish.device)
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
    return Merged(export, folder, dtype, reason, kept, live)


def _write(merge: Merge, folder: Path, dtype: str, export: "Export") -> Kept:
    check_disk(merge.written_bytes(dtype), export.target)
    with bar(f"merging as {dtype}") as moved:
        return merge.write(folder, dtype, moved)
