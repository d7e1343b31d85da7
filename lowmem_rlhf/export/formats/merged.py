"""``--format merged``: the base's weights with the change added, as a folder for transformers and vLLM."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.families.wrappers import auto_class
from lowmem_rlhf.export.formats.adapter_files import copy_heads
from lowmem_rlhf.export.formats.format import ExportBytes, ExportFormat, Written
from lowmem_rlhf.export.job import ExportJob
from lowmem_rlhf.export.options import ORIGINAL, QUANTIZED, TEXT, ExportOptions
from lowmem_rlhf.export.source import read_config
from lowmem_rlhf.planning.memory.export import export_disk_bytes, export_memory_bytes
from lowmem_rlhf.run.directory import RunDirectory


class MergedFormat(ExportFormat):
    """Merged weights in the dtype that keeps the change, loaded again with stock transformers as their proof."""

    name = "merged"
    takes = frozenset({"onto", "dtype", "heads", "as_class"})
    library = "transformers"

    def check(self, options: ExportOptions, run: RunDirectory) -> ExportOptions:
        """The change is added to the numbers that the run computed with, unless others are asked for."""
        return replace(options, onto=options.onto or QUANTIZED)

    def bytes(self, job: ExportJob, dims: ModelDimensions) -> ExportBytes:
        """Merging, and then the models of the proof."""
        return merge_bytes(job, dims)

    def write(self, job: ExportJob, folder: Path) -> Written:
        """Merge, and copy the heads that were asked for."""
        from lowmem_rlhf.export.merging.run import merge_run

        merged = merge_run(job, folder, job.options.dtype, text_alone=job.options.as_class == TEXT)
        return Written({**merged.facts(), **copy_heads(job, folder)}, merged)

    def prove(self, job: ExportJob, folder: Path, written: Written) -> dict[str, Any]:
        """Compare the folder, loaded again, with the live policy or with the adapter on the original weights."""
        proof: dict[str, Any] = written.evidence.proof(job.device)
        return proof

    def usage(self, folder: Path, name: str, base: str, spec: AlgorithmSpec | None) -> str:
        """Loading it with transformers."""
        auto = auto_class(read_config(folder) if (folder / "config.json").is_file() else {})
        return (
            f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
            'folder = "."  # this folder, or its Hub id\n'
            f'model = {auto}.from_pretrained(folder, dtype="auto")\n'
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
        )


def merge_bytes(job: ExportJob, dims: ModelDimensions) -> ExportBytes:
    """Return the bytes of an export that merges; with ``quantize`` those of a GGUF that is made of it are included."""
    options = job.options
    dtype = options.dtype or ("float32" if dims.overflows_float16 else "float16")
    onto = QUANTIZED if job.onto_quantized else ORIGINAL
    precision = (job.settings["quantization"], job.settings["compute_dtype"])
    memory = export_memory_bytes(dims, *precision, dtype, onto, options.quantize)
    return ExportBytes(dtype, memory, export_disk_bytes(dims, dtype, options.quantize))
