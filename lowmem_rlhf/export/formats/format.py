"""What an export format is: the options it takes, the bytes it needs, how it is written, proven and used.

No torch here: options are checked before anything costly is imported. To add a format, see `formats.table`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.export.job import ExportJob
from lowmem_rlhf.export.options import CHOICES, ExportOptions
from lowmem_rlhf.run.directory import RunDirectory


@dataclass(frozen=True)
class ExportBytes:
    """The bytes that an export takes.

    Attributes:
        dtype: that its weights are stored in, or None where they keep their own.
        memory: of each part, which come one after another (names as in `planning.memory.export`).
        disk: while it is made.
    """

    dtype: str | None
    memory: dict[str, int]
    disk: int


@dataclass(frozen=True)
class Written:
    """What a format wrote into the folder.

    Attributes:
        facts: for export.json.
        evidence: what the format's own `prove` needs beside the folder.
    """

    facts: dict[str, Any]
    evidence: Any = None


class ExportFormat(ABC):
    """A kind of folder that a trained model leaves as.

    Attributes:
        name: as ``--format`` takes it; also the folder's name.
        takes: which of the options ``onto``, ``dtype``, ``quantize``, ``heads`` and ``as_class`` it has a use for.
        choices: the values that options may have.
        refusals: sentences for options that it does not take, where the usual one does not say enough.
        holds_scores: whether it can hold a reward model, an adapter with a score head.
        library: that loads it, as the Hub names it.
        relation: to the base, as the Hub names it.
        tags: on the Hub.
    """

    name: str
    takes: frozenset[str] = frozenset()
    choices: Mapping[str, tuple[str, ...]] = CHOICES
    refusals: Mapping[str, str] = MappingProxyType({})
    holds_scores: bool = False
    library: str | None = None
    relation: str = "finetune"
    tags: tuple[str, ...] = ()

    def check(self, options: ExportOptions, run: RunDirectory) -> ExportOptions:
        """Return the options with the format's defaults; by then they are known values that the format takes.

        Raises:
            UserError: they cannot be had of this run.
        """
        return options

    @abstractmethod
    def bytes(self, job: ExportJob, dims: ModelDimensions) -> ExportBytes:
        """Return the bytes of memory and disk that the export will take."""

    @abstractmethod
    def write(self, job: ExportJob, folder: Path) -> Written:
        """Write the export into an empty folder, which becomes ``job.target`` once it is proven.

        Raises:
            UserError, RunError: it cannot be made.
            OSError: a file cannot be written.
        """

    @abstractmethod
    def prove(self, job: ExportJob, folder: Path, written: Written) -> dict[str, Any]:
        """Load the export as others load it, compare it with the live policy, and return export.json's ``proof``.

        Raises:
            RunError: it is not what the live policy is; then nothing is kept.
        """

    def usage(self, folder: Path, name: str, base: str, spec: AlgorithmSpec | None) -> str:
        """Return how the export is used, as Markdown for the model card; empty where that is not known.

        Args:
            folder: of the export.
            name: of the recipe.
            base: a Hub id, or a placeholder for the path of a local model.
            spec: of the algorithm that the run was trained with; None: it is not known here.
        """
        return ""
