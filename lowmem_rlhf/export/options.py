"""The options of `export`. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowmem_rlhf.planning.memory.export import GGUF_BYTES, WIDTHS

QUANTIZED, ORIGINAL = ONTO = ("quantized", "original")
WRAPPER, TEXT = CLASSES = ("wrapper", "text")
FLAGS = {"as_class": "for"}  # options that the command line calls otherwise
CHOICES = {  # the values that options may have
    "onto": ONTO,
    "dtype": tuple(WIDTHS),
    "quantize": tuple(GGUF_BYTES),
    "as_class": CLASSES,
}


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export; None leaves the choice to the program.

    Attributes:
        format: the name of a format (`formats.table.FORMATS`); by default adapter for a reward model, otherwise merged.
        onto: which weights the change is added to: ``quantized`` (the numbers that the run computed with) or
            ``original`` (the 16-bit ones).
        dtype: of merged weights.
        quantize: of a GGUF: f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m.
        output: the folder.
        step: of a checkpoint; ``best``: that of the best evaluation.
        heads: whether a critic or a score head goes along.
        as_class: of a base inside a model for images or sound, the class whose names the files carry: ``wrapper`` (the
            whole model's) or ``text`` (the text-only one's).
        device: as in a recipe.
        push: a repository on the Hub.
    """

    format: str | None = None
    onto: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    output: Path | None = None
    step: int | Literal["best"] | None = None
    heads: bool = False
    as_class: str | None = None
    device: str | None = None
    push: str | None = None
