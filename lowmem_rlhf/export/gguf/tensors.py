"""A GGUF's tensors: their names, their types by kind, and their bytes, some rows at a time.

The mixtures of types of q4_k_m and q5_k_m, and what stands in where a row cannot be cut into super-blocks, are
llama.cpp's (`llama_tensor_get_type_impl` and `tensor_type_fallback` in llama-quant.cpp).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from lowmem_rlhf.engine.gguf_changes import Change, Part, parts_of
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.gguf.kquants import quantize_q4_k, quantize_q5_k, quantize_q6_k
from lowmem_rlhf.export.gguf.metadata import GGUFMetadata
from lowmem_rlhf.export.shards import Stored
from lowmem_rlhf.export.tokenizer import WAY_OUT

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q8_0, Q5_0, Q5_1 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q5_1
Q4_K, Q5_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K
K_QUANTS = {Q4_K: quantize_q4_k, Q5_K: quantize_q5_k, Q6_K: quantize_q6_k}
MIXTURES = {"q4_k_m": Q4_K, "q5_k_m": Q5_K, "q6_k": Q6_K}  # kinds of files, and the type of most of their tensors
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
PIECE = 2**22  # elements at once
_LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF.

    Attributes:
        shape: rows first, as in torch; without the rows that no token of the vocabulary has.
        source: where its numbers lie; None: they are ``factors``.
        origin: transformers' name.
        part: rows of that, where it becomes several tensors.
        changes: of its numbers.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    source: Stored | None
    origin: str = ""
    part: tuple[int, int] | None = None
    changes: tuple[Change, ...] = ()
    factors: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    def pieces(self, device: torch.device) -> Iterator[torch.Tensor]:
        """Yield its bytes (uint8, on the CPU), some rows at a time.

        Raises:
            RunError: a number does not fit in float16.
            UserError: the file is cut off.
        """
        if self.source is None:
            yield torch.tensor(self.factors, dtype=torch.float32, device="cpu").view(torch.uint8)
            return
        for part in self.rows():
            yield self._encode(part, device)

    def rows(self) -> Iterator[torch.Tensor]:
        """Yield its numbers as the file has them, some rows at a time."""
        assert self.source is not None
        if self.part or not all(change.by_rows for change in self.changes):  # small beside the embeddings
            numbers = self._changed(self.source.read(slice(*self.part) if self.part else None))
            step = max(1, PIECE // max(1, math.prod(self.shape[1:])))
            parts: Iterator[torch.Tensor] = iter(numbers.split(step))
        else:
            parts = (self._changed(self.source.read(rows)) for rows in self.source.rows(PIECE))
        left = self.shape[0]
        for part in parts:
            part = part[:left]
            left -= len(part)
            if len(part):
                yield part

    def restore(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the numbers as transformers stores them, from those of the file (fp32, of `shape`)."""
        for change in reversed(self.changes):
            numbers = change.undo(numbers)
        return numbers

    def _changed(self, numbers: torch.Tensor) -> torch.Tensor:
        for change in self.changes:
            numbers = change.apply(numbers)
        return numbers

    def _encode(self, part: torch.Tensor, device: torch.device) -> torch.Tensor:
        numbers = part.to(device)
        if self.type in DTYPES:
            result = numbers.to(DTYPES[self.type]).contiguous()
            if self.type == F16 and not torch.isfinite(result).all():
                raise RunError(f"{self.name} holds numbers that do not fit in float16; take --quantize bf16 or q8_0")
        elif self.type in K_QUANTS:
            result = K_QUANTS[self.type](numbers.float())
        else:
            result = torch.from_numpy(quantize(numbers.float().cpu().numpy(), self.type))
        return result.cpu().view(-1).view(torch.uint8)


def plan_tensors(
    stored: Mapping[str, Stored], config: Any, metadata: GGUFMetadata, kind: str, vocabulary: int
) -> list[Tensor]:
    """Return a GGUF's tensors.

    Args:
        stored: the model's tensors by transformers' names.
        kind: f32, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m.
        vocabulary: how many tokens there are; embeddings have as many rows.

    Raises:
        UserError: a tensor has no place in llama.cpp's model.
    """
    layout, layers = metadata.layout, int(config.num_hidden_layers)
    names = get_tensor_name_map(next(a for a, name in MODEL_ARCH_NAMES.items() if name == layout.name), layers)
    used = {name: one for name, one in stored.items() if not _left_out(name, one, config)}
    tied = not any(name == "lm_head.weight" for name in used)
    tensors = []
    for name, one in used.items():
        for part in parts_of(name, one.shape, config, layout):
            gguf_name = part.name if part.name.startswith("blk.") else _gguf_name(names, part.name)
            if gguf_name is None:
                raise UserError(f"{name} has no place in llama.cpp's {layout.name} model; {WAY_OUT}")
            shape = _shape(one.shape, part)
            if gguf_name in ("token_embd.weight", "output.weight", "per_layer_token_embd.weight"):
                shape = (min(vocabulary, shape[0]), *shape[1:])
            type_ = choose_type(gguf_name, shape, kind, layers, tied)
            tensors.append(Tensor(gguf_name, shape, type_, one, name, part.rows, part.changes))
    for name, factors in metadata.factors.items():
        tensors.append(Tensor(name, (len(factors),), F32, None, factors=tuple(factors)))
    return tensors


def _shape(stored: tuple[int, ...], part: Part) -> tuple[int, ...]:
    """Return the shape in the file, without dimensions of one that a convolution's kernels have."""
    numbers = torch.empty(stored, device="meta")
    if part.rows:
        numbers = numbers[slice(*part.rows)]
    for change in part.changes:
        numbers = change.apply(numbers)
    return tuple(n for n in numbers.shape if n > 1 or numbers.ndim < 3)


def _left_out(name: str, one: Stored, config: Any) -> bool:
    """Whether a tensor is no weight of its own: a mask in an old file, or a head that is tied to the embedding."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    return not one.is_number or name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))


def _gguf_name(names: TensorNameMap, name: str) -> str | None:
    for text in (name, f"transformer.{name}", f"model.{name}"):  # some files leave the outermost name out
        if gguf_name := names.get_name(text, try_suffixes=(".weight", ".bias")):
            return gguf_name
    return None


def choose_type(name: str, shape: tuple[int, ...], kind: str, layers: int, tied: bool) -> GGMLQuantizationType:
    """Return the type of a tensor.

    Args:
        name: of the GGUF.
        kind: as in `plan_tensors`.
        layers: of the model.
        tied: the token embedding is the output matrix too.
    """
    exact = ("_norm.weight", "conv.weight", "conv1d.weight", "post_norm.weight")
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(exact) or name == "position_embd.weight":
        return F32
    if kind not in MIXTURES:
        wanted = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}[kind]
    elif name == "output.weight" or (tied and name == "token_embd.weight"):
        wanted = Q6_K if shape[-1] % 256 == 0 else Q8_0
    else:
        sensitive = re.search(r"\.(attn_v|attn_qkv|ffn_down)\.weight$", name) is not None
        wanted = Q6_K if sensitive and _more_bits(int(_LAYER.findall(name)[0]), layers) else MIXTURES[kind]
    if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    second = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}.get(wanted, F16)
    return second if shape[-1] % GGML_QUANT_SIZES[second][0] == 0 else F16


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
