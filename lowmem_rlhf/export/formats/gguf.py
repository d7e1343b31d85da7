"""``--format gguf``: one file for llama.cpp, made of merged weights."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.export.formats.format import ExportBytes, ExportFormat, Written
from lowmem_rlhf.export.formats.merged import merge_bytes
from lowmem_rlhf.export.job import ExportJob
from lowmem_rlhf.export.options import ORIGINAL, ExportOptions
from lowmem_rlhf.files import delete
from lowmem_rlhf.run.directory import RunDirectory

if TYPE_CHECKING:
    from lowmem_rlhf.export.merging.run import Merged

WORK = "merged.tmp"  # merged weights that the GGUF is made of
DTYPES = {"f16": "float16", "bf16": "bfloat16"}  # kinds that are stored as a dtype, so weights are merged in it
DEFAULT = "q8_0"


@dataclass(frozen=True)
class GGUFEvidence:
    """What a GGUF is compared with.

    Attributes:
        file: the GGUF.
        work: the folder of the merged weights that it was made of.
        proof: of these weights.
    """

    file: Path
    work: Path
    merged: "Merged"
    proof: dict[str, Any]


class GGUFFormat(ExportFormat):
    """A GGUF, whose numbers are read back and whose predictions are compared as its proof."""

    name = "gguf"
    takes = frozenset({"onto", "quantize"})
    refusals = MappingProxyType(
        {
            "dtype": "--dtype has no meaning with --format {format}; leave it out; a GGUF's numbers are chosen with "
            "--quantize",
            "heads": "--heads: a GGUF holds no value or score heads; take --format merged or adapter",
        }
    )
    tags = ("gguf",)

    def check(self, options: ExportOptions, run: RunDirectory) -> ExportOptions:
        """It is quantized again, so the change is added to the 16-bit weights unless others are asked for."""
        return replace(options, onto=options.onto or ORIGINAL, quantize=options.quantize or DEFAULT)

    def bytes(self, job: ExportJob, dims: ModelDimensions) -> ExportBytes:
        """Merging, the models of the proof, and for a time merged weights and GGUF side by side on the disk."""
        return merge_bytes(job, dims)

    def write(self, job: ExportJob, folder: Path) -> Written:
        """Merge into a folder beside the file, prove that, and turn it into the GGUF."""
        from lowmem_rlhf.export.framing import framing
        from lowmem_rlhf.export.gguf.write import write_gguf
        from lowmem_rlhf.export.merging.run import merge_run
        from lowmem_rlhf.export.timed import timed
        from lowmem_rlhf.export.tokenizer import load_tokenizer

        kind, work = job.options.quantize or DEFAULT, folder / WORK
        work.mkdir()
        merged = merge_run(job, work, DTYPES.get(kind), text_alone=True)
        proof = merged.proof(job.device)
        name = re.sub(r"[^\w.-]+", "-", job.recipe.name).strip(".-") or "model"
        file = folder / f"{name}-{kind.upper()}.gguf"
        frame = framing(load_tokenizer(work), job.recipe.data)
        with timed(f"writing {file.name}") as moved:
            penalty = job.recipe.generation.repetition_penalty
            write_gguf(work, file, kind, moved, job.device, frame.add_bos, penalty)
        facts = {**merged.facts(), "quantize": kind, "file": file.name, **frame.facts()}
        return Written(facts, GGUFEvidence(file, work, merged, proof))

    def prove(self, job: ExportJob, folder: Path, written: Written) -> dict[str, Any]:
        """Compare its numbers with the merged weights, which are then deleted, and its predictions."""
        from lowmem_rlhf.export.gguf.proof import proof_of_gguf

        evidence: GGUFEvidence = written.evidence
        merged, kind = evidence.merged, written.facts["quantize"]
        of_gguf = proof_of_gguf(evidence.file, evidence.work, merged.live, merged.reference, DTYPES.get(kind, kind))
        delete(evidence.work)
        return evidence.proof | of_gguf | {"judged": evidence.proof["judged"] + of_gguf["judged"]}

    def usage(self, folder: Path, name: str, base: str, spec: AlgorithmSpec | None) -> str:
        """Running it with llama.cpp."""
        file = next((path.name for path in sorted(folder.glob("*.gguf"))), None)
        return f"```\nllama-cli -m {file}\n```" if file else ""
