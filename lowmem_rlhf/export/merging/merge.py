"""Merging an adapter into its base, from file to file: a tensor's rows are read, changed, rounded and written.

``W + scaling * B A`` (LoRA, arXiv 2106.09685) is computed in fp32 and rounded once; `export.rounding` measures
how much of the change is kept. Some rows are in memory at a time, or one whole tensor where the base was quantized.

What is left out: sums on a GPU, which would wait for the disk. A GPU only quantizes, where the run's base lay on one.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lowmem_rlhf.engine.load import DTYPES
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.merging.dequantized import dense
from lowmem_rlhf.export.merging.lora_file import LoraFile
from lowmem_rlhf.export.merging.names import Skeleton, expert_settings, stacks_of, stored_names
from lowmem_rlhf.export.rounding import RoundingStats, rounded_sum
from lowmem_rlhf.export.shards import NAMES, SINGLE, FileLayout, Stored, read_bytes, write_index, write_tensors
from lowmem_rlhf.progress import ProgressCallback

PIECE = 2**20  # elements that are computed at once; an allocator keeps as many, and a cache nearly holds them
SAMPLED = 8  # layers on which a dtype is tried out


class Merge:
    """A base, an adapter for it, and what each stored tensor becomes.

    Args:
        shards: the base's tensors by file and name (`read_shards`).
        model: the base without weights; what is ``quantized`` in it is dequantized.
        adapter: what is added.
        compute_dtype, device: with which the base was quantized.

    Raises:
        UserError: the adapter changes a layer that the base's files do not have, or a tensor has another shape.
    """

    def __init__(
        self,
        shards: dict[str, dict[str, Stored]],
        model: Skeleton,
        adapter: LoraFile,
        compute_dtype: str,
        device: torch.device,
    ) -> None:
        self.shards, self.model, self.adapter = shards, model, adapter
        self.compute_dtype, self.device = DTYPES[compute_dtype], device
        self.tensors = {name: stored for file in shards.values() for name, stored in file.items()}
        self.parameters = stored_names(model.shapes, self.tensors, model.renamed)
        beside = {name: expert_settings(name, model.quantized) for name in self.tensors.keys() - self.parameters.keys()}
        self.experts = {name: settings for name, settings in beside.items() if settings is not None}
        self._check_names()
        self._check_shapes()

    def _check_names(self) -> None:
        parameters = set(self.parameters.values())
        numbers = (re.search(r"\blayers\.(\d+)\.", name) for name in self.experts)
        by_one = {name for match in numbers if match for name in stacks_of(int(match[1]), self.model.quantized)}
        quantized = [name for name in self.model.quantized if name not in by_one]
        needed = dict.fromkeys([f"{layer}.weight" for layer in self.adapter.layers] + quantized)
        if lacking := [name for name in needed if name not in parameters]:
            raise UserError(
                f"the base's files have no tensor for {lacking[0]} ({len(lacking)} of {len(needed)} are missing; one "
                f"that is there: {next(iter(self.tensors), 'none')}); the tensors were renamed or are another model's: "
                "give the model that the run was trained on"
            )

    def _check_shapes(self) -> None:
        shapes = self.model.shapes
        for name, parameter in self.parameters.items():
            if self.tensors[name].shape != shapes[parameter]:
                raise UserError(
                    f"{self.tensors[name].file} holds {name} of shape {self.tensors[name].shape}, and by the model's "
                    f"config it is {shapes[parameter]}; the files are of different revisions: fetch the model again"
                )
        for layer, (inputs, outputs) in self.adapter.layers.items():
            name = f"{layer}.weight"
            if shapes[name] != ((inputs, outputs) if name in self.model.transposed else (outputs, inputs)):
                raise UserError(
                    f"the adapter takes {layer} from {inputs} to {outputs} numbers, and the base's weight there has "
                    f"the shape {shapes[name]}; this is not the base (or its revision) that the run was trained on"
                )

    @property
    def changed(self) -> list[str]:
        """Names of the stored tensors that the adapter changes."""
        layers = {f"{layer}.weight" for layer in self.adapter.layers}
        return [name for name, parameter in self.parameters.items() if parameter in layers]

    def layout(self, file: str, dtype: str) -> FileLayout:
        """Return the layout of a file whose tensors are stored in a dtype, widest elements first as in safetensors."""
        entries = []
        for name, stored in self.shards[file].items():
            kind, width = stored.dtype, (stored.end - stored.begin) / max(1, stored.elements)
            if self._is_cast(name):
                kind, width = NAMES[DTYPES[dtype]], DTYPES[dtype].itemsize
            entries.append((width, (name, kind, stored.shape, round(width * stored.elements))))
        return [entry for _, entry in sorted(entries, key=lambda one: -one[0])]

    def written_bytes(self, dtype: str) -> int:
        """Bytes of all tensors in a dtype."""
        return sum(size for file in self.shards for *_, size in self.layout(file, dtype))

    def _is_cast(self, name: str) -> bool:
        known = name in self.parameters or name in self.experts  # what the model lacks is copied as it is
        return known and self.tensors[name].is_number

    def write(self, target: Path, dtype: str, progress: ProgressCallback | None = None) -> RoundingStats:
        """Write the merged weights into a folder, in files as the base has them; return what rounding kept.

        Raises:
            DoesNotFit: a weight is too large for the dtype.
            RunError: a weight of the base is no finite number.
            OSError: a file cannot be written.
        """
        rounding, done, total = RoundingStats(), 0, self.written_bytes(dtype)

        def pieces(layout: FileLayout) -> Iterator[torch.Tensor]:
            nonlocal done
            for name, *_ in layout:
                for piece in self._pieces(name, DTYPES[dtype], rounding):
                    yield piece
                    done += piece.nbytes
                    if progress:
                        progress(done, total)

        for file in self.shards:
            layout = self.layout(file, dtype)
            write_tensors(target / file, layout, pieces(layout))
        if list(self.shards) != [SINGLE]:
            write_index(target, self.shards, total)
        return rounding

    def try_out(self, dtype: str) -> RoundingStats:
        """Return what rounding would keep of some changed layers' first rows; nothing is written.

        Raises:
            DoesNotFit, RunError: as `write`.
        """
        rounding, names = RoundingStats(), self.changed
        for name in evenly(names, SAMPLED):
            next(self._pieces(name, DTYPES[dtype], rounding))
        return rounding

    def _pieces(self, name: str, dtype: torch.dtype, rounding: RoundingStats) -> Iterator[torch.Tensor]:
        """Yield a tensor as it is stored, piece by piece."""
        stored = self.tensors[name]
        if not self._is_cast(name):
            for begin in range(stored.begin, stored.end, 8 * PIECE):
                yield read_bytes(stored.file, begin, min(begin + 8 * PIECE, stored.end))
            return
        whole, parameter = self._dequantized(name), self.parameters.get(name, name)
        layer = parameter.removesuffix(".weight")
        left = right = None
        if layer in self.adapter.layers:
            left, right = self.adapter.factors(layer, parameter in self.model.transposed)
        for rows in stored.rows(PIECE):
            base = self._as_computed(stored.read(rows), parameter) if whole is None else whole[rows]
            change = None if left is None or right is None else left[rows] @ right
            yield rounded_sum(base, change, dtype, rounding, name)

    def _as_computed(self, weight: torch.Tensor, parameter: str) -> torch.Tensor:
        """Return what a quantized base computes with for weights without codes: embeddings and norms, in its dtype."""
        if not self.model.quantized or parameter in self.model.wide:
            return weight
        rounded = weight.to(self.compute_dtype)
        return rounded if torch.isfinite(rounded).all() else weight

    def _dequantized(self, name: str) -> torch.Tensor | None:
        """Return the numbers that a quantized tensor stands for; None for one that is not quantized."""
        parameter = self.parameters.get(name, name)
        settings = self.experts.get(name, self.model.quantized.get(parameter))
        if settings is None:
            return None
        weight = self.tensors[name].read()
        if parameter in self.model.transposed:  # the loader turns it before it quantizes
            return dense(weight.t().contiguous(), settings, self.compute_dtype, self.device).t()
        return dense(weight, settings, self.compute_dtype, self.device)


def evenly(names: Sequence[str], count: int) -> list[str]:
    """Return at most ``count`` of the names, evenly spread."""
    return [names[i * len(names) // count] for i in range(count)] if len(names) > count else list(names)
