"""An adapter on disk as a merge reads it: the two factors of one layer at a time, fp32."""

import re
from pathlib import Path

import torch

from lowmem_rlhf.architecture.adapters import WEIGHTS, SavedAdapter
from lowmem_rlhf.architecture.families.wrappers import text_key
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.shards import Stored, read_header

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class LoraFile:
    """A saved adapter's factors.

    Attributes:
        folder: where it lies.
        shape: how it is scaled.
        layers: those that it changes, by name: (inputs, outputs).

    Raises:
        UserError: the file is not whole, or holds more than pairs of factors.
    """

    def __init__(self, saved: SavedAdapter) -> None:
        self.folder = saved.folder
        self.shape = saved.shape
        self._factors: dict[tuple[str, str], Stored] = {}
        for name, stored in self._tensors(saved.folder / WEIGHTS).items():
            match = _NAME.fullmatch(text_key(name))
            if not match or len(stored.shape) != 2 or not stored.is_number:
                raise UserError(
                    f"adapter {saved.folder} holds {name} of shape {stored.shape}, which is no factor of a linear "
                    "layer; only LoRA beside linear layers can be merged"
                )
            self._factors[match[1], match[2]] = stored
        self.layers: dict[str, tuple[int, int]] = {}
        for layer in sorted({layer for layer, _ in self._factors}):
            pair = [self._factors.get((layer, letter)) for letter in "AB"]
            if pair[0] is None or pair[1] is None or pair[0].shape[0] != pair[1].shape[1]:
                raise UserError(f"adapter {saved.folder} holds no pair of factors of {layer}; take another checkpoint")
            self.layers[layer] = (pair[0].shape[1], pair[1].shape[0])

    def _tensors(self, path: Path) -> dict[str, Stored]:
        try:
            return read_header(path)
        except OSError as error:
            raise UserError(f"adapter {path} cannot be read ({error.strerror}); take another checkpoint") from error

    def factors(self, layer: str, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors whose product is the layer's change, in the orientation of its stored weight.

        Args:
            transposed: the weight is stored (in, out) and not (out, in).

        Returns:
            (out, r) and (r, in), or (in, r) and (r, out).
        """
        a = self._factors[layer, "A"].read().float()  # (r, in)
        b = self._factors[layer, "B"].read().float() * self.shape.scaling(layer)  # (out, r)
        return (a.t().contiguous(), b.t().contiguous()) if transposed else (b, a)
