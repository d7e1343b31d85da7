"""What is run with stock transformers and peft, and how the blocks of the model families differ there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lowmem_rlhf.planning.dimensions import ModelDimensions


@dataclass(frozen=True)
class StockRun:
    """What is run: the columns of a measured row.

    Attributes:
        quantization: of the blocks' linear layers; ``nf4`` and ``int8`` go through ``prepare_model_for_kbit_training``,
            so embedding, norms and head are float32, and with them everything between the layers.
        precision: the dtype the model is loaded and computes in.
        optimizer: as transformers names it.
        targets: names of the layers with adapters, without ``_proj`` if you like; ``all-linear`` for all.
    """

    dimensions: ModelDimensions
    batch_size: int
    sequence_length: int
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    double_quantization: bool = False
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    attention: Literal["eager", "sdpa"] = "sdpa"
    optimizer: str = "adamw"
    r: int = 16
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    gradient_checkpointing: bool = True

    @property
    def compute_width(self) -> int:
        """Bytes of a number in the dtype that the model is loaded in."""
        return 4 if self.precision == "float32" else 2

    @property
    def hidden_width(self) -> int:
        """Bytes of a number between the layers, in the embedding, the norms and the head."""
        return self.compute_width if self.quantization == "none" else 4

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.sequence_length

    def adapters(self) -> Iterator[tuple[tuple[int, str, str], int]]:
        """Yield each trained weight: its layer, its linear and A or B, and its elements."""
        wanted = {name.removesuffix("_proj") for name in self.targets}
        for layer in range(self.dimensions.num_layers):
            for linear in self.dimensions.linears:
                if "all-linear" in wanted or linear.name.removesuffix("_proj") in wanted:
                    yield (layer, linear.name, "A"), linear.inputs * self.r
                    yield (layer, linear.name, "B"), linear.outputs * self.r


@dataclass(frozen=True)
class Block:
    """How a family's block departs from Llama's.

    Attributes:
        cast_last: its norms multiply by their weight in float32 (Gemma).
        qk_norm: queries and keys are normed by head.
        post_norms: attention and MLP are normed after, not only before (Gemma 2 and 3).
        pre_norms: they are normed before.
        soft_cap: scores and logits go through ``tanh`` (Gemma 2), which no fused attention does.
        scaled_embedding: the embedding is multiplied by a number (Gemma).
        masks: attention masks that are made for eager attention.
    """

    cast_last: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    pre_norms: bool = True
    soft_cap: bool = False
    scaled_embedding: bool = False
    masks: int = 1


_GEMMA: dict[str, Any] = {"cast_last": True, "scaled_embedding": True}
BLOCKS = {
    "llama": Block(),
    "mistral": Block(),
    "qwen2": Block(),
    "smollm3": Block(),
    "phi3": Block(),
    "qwen3": Block(qk_norm=True),
    "gemma": Block(**_GEMMA),
    "gemma2": Block(**_GEMMA, post_norms=True, soft_cap=True, masks=2),
    "gemma3_text": Block(**_GEMMA, post_norms=True, qk_norm=True, masks=2),
    "olmo2": Block(cast_last=True, post_norms=True, pre_norms=False, qk_norm=True),
}
