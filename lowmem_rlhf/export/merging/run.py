"""A run's adapter merged into its base's files, with the dtype chosen on the way, and the proof of the result."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.architecture.families import family_of
from lowmem_rlhf.architecture.families.wrappers import is_wrapper
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.framing import end_turns, keep_controls, keep_template_options
from lowmem_rlhf.export.job import ExportJob
from lowmem_rlhf.export.merging.dtypes import check_rounding, choose_dtype, does_not_fit
from lowmem_rlhf.export.merging.lora_file import LoraFile
from lowmem_rlhf.export.merging.merge import Merge
from lowmem_rlhf.export.merging.names import skeleton
from lowmem_rlhf.export.options import ORIGINAL, QUANTIZED
from lowmem_rlhf.export.proof import verify
from lowmem_rlhf.export.proof.outputs import PolicyOutputs, policy_outputs
from lowmem_rlhf.export.proof.stock import (
    Reference,
    compare_with_stock,
    is_stored_as_computed,
    live_reference,
    original_reference,
)
from lowmem_rlhf.export.rounding import LOST, DoesNotFit, RoundingStats
from lowmem_rlhf.export.shards import read_shards, text_shards
from lowmem_rlhf.export.source import base_folder, copy_side_files, read_config, write_config
from lowmem_rlhf.export.target import check_disk
from lowmem_rlhf.export.timed import timed
from lowmem_rlhf.progress import message

if TYPE_CHECKING:
    import torch

HALVES, BLOCK_KINDS = ("float16", "bfloat16"), ("q8_0", "q6_k", "q5_k_m", "q4_k_m")


@dataclass(frozen=True)
class Merged:
    """Merged weights in a folder.

    Attributes:
        onto: the weights that the change was added to, as ``--onto`` names them.
        base_quantization: of the run.
        dtype, reason: how they are stored, and why.
        rounding: what it kept of the change.
        live: the live policy's outputs, for the proof.
        verdicts: of the live policy's comparison with stock.
        reference: what the export must reproduce; None where there is no room for it.
        notes: sentences on the folder's other files.
    """

    folder: Path
    onto: str
    base_quantization: str
    dtype: str
    reason: str
    rounding: RoundingStats
    live: PolicyOutputs
    verdicts: list[dict[str, Any]]
    reference: Reference | None
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what export.json says of the merge."""
        return {
            "onto": self.onto,
            "base_quantization": self.base_quantization,
            "dtype": self.dtype,
            "dtype_reason": self.reason,
            "relative_change": self.rounding.relative_change,
            "notes": list(self.notes),
        }

    def proof(self, device: "torch.device") -> dict[str, Any]:
        """Load the folder again and compare it with what it reproduces.

        Raises:
            RunError: it has lost the adapter, or is another model.
        """
        proof = verify.proof_of_merged(self.folder, self.live, self.verdicts, self.reference, self.dtype, device)
        return proof | {"kept_share": self.rounding.share}


def merge_run(job: ExportJob, folder: Path, wanted: str | None, text_alone: bool = False) -> Merged:
    """Merge a run's adapter into its base, into a folder that others load.

    Args:
        wanted: the dtype that was asked for; None: choose.
        text_alone: of a base inside a model for images or sound, write the text-only class alone; otherwise the whole
            model, whose other towers are copied as they are.

    Raises:
        UserError: the base or the adapter cannot be read, or the dtype that was asked for would lose the change.
        RunError: the change is lost, the live policy is not stock's, or the disk is too small.
    """
    recipe, settings = job.recipe, job.settings
    source = base_folder(recipe.model, recipe.revision)
    quantization = settings["quantization"] if job.onto_quantized else "none"
    model = skeleton(source, quantization, settings["compute_dtype"], recipe.trust_remote_code)
    adapter = LoraFile(saved_adapter(str(job.adapter), recipe.model, recipe.revision))
    shards = read_shards(source)
    wrapped = is_wrapper(read_config(source))
    text_alone = text_alone and wrapped
    merge = Merge(text_shards(shards) if text_alone else shards, model, adapter, settings["compute_dtype"], job.device)
    dtype, reason = choose_dtype(merge, wanted, family_of(model.model_type).overflows_float16)
    live = policy_outputs(job.opened, job.options.device)
    verdicts, reference = _reference(live, job, dtype)
    try:
        rounding = _write(merge, folder, dtype, job.target)
    except DoesNotFit as error:
        if wanted:
            raise does_not_fit(str(error), dtype) from error
        dtype, reason = "float32", f"{error} does not fit in float16"
        message(f"{reason}; merging again as {dtype}")
        rounding = _write(merge, folder, dtype, job.target)
    _check_change(rounding, dtype, wanted)
    write_config(source, folder, dtype, text_alone)
    copy_side_files(source, folder, text_alone)
    notes = _about_towers(merge, text_alone) if wrapped else ()
    notes += keep_template_options(folder, recipe.data.chat_template_kwargs)
    notes += end_turns(folder)  # with these options as the template's defaults
    notes += keep_controls(folder, recipe.generation)
    onto = QUANTIZED if job.onto_quantized else ORIGINAL
    return Merged(folder, onto, settings["quantization"], dtype, reason, rounding, live, verdicts, reference, notes)


def _about_towers(merge: Merge, text_alone: bool) -> tuple[str, ...]:
    """Return a sentence on what the base's files hold beside its text tower."""
    if text_alone:
        return ("the text tower alone, as the text-only class: towers for images or sound are left out",)
    others = len(merge.tensors) - len(merge.parameters)
    return (f"{others} tensors beside the text tower (for images, sound, or predicting several tokens) are the base's",)


def _reference(live: PolicyOutputs, job: ExportJob, dtype: str) -> tuple[list[dict[str, Any]], Reference | None]:
    """Compare the live policy with stock, and return the verdicts and what the export must reproduce.

    On other numbers than the run computed with, predictions differ by the base's quantization, so the reference is the
    adapter on these numbers.

    Raises:
        RunError: the live policy is not stock's.
    """
    kinds = [kind for kind in (dtype, job.options.quantize) if kind in (*HALVES, *BLOCK_KINDS)]
    if job.onto_quantized or is_stored_as_computed(job.recipe, job.settings):
        stock = compare_with_stock(live, job.adapter, job.device, job.settings, kinds)
        return stock.verdicts, live_reference(live, stock)
    verdicts = compare_with_stock(live, job.adapter, job.device, job.settings).verdicts
    return verdicts, original_reference(live, job.adapter, job.device, kinds)


def _write(merge: Merge, folder: Path, dtype: str, target: Path) -> RoundingStats:
    check_disk(merge.written_bytes(dtype), target)
    with timed(f"merging as {dtype}") as moved:
        return merge.write(folder, dtype, moved)


def _check_change(rounding: RoundingStats, dtype: str, wanted: str | None) -> None:
    """Check that rounding left enough of the change.

    Raises:
        UserError: bfloat16 was asked for and keeps too little.
        RunError: the change is lost.
    """
    check_rounding(rounding, wanted)
    if rounding.share < LOST:
        raise RunError(
            f"{dtype} keeps only {max(0.0, rounding.share):.0%} of what training changed "
            f"({rounding.relative_change:.1e} of the weights), so the export would be the base; take --dtype float32. "
            "Nothing was kept"
        )
