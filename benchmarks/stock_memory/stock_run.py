"""What is run with stock transformers, peft and bitsandbytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.families.block import Linear


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

    def linears(self) -> dict[str, Linear]:
        """The linear layers of a block by name; GPT-2 has two of one name."""
        named: dict[str, Linear] = {}
        for linear in self.dimensions.linears:
            named[linear.name if linear.name not in named else f"mlp.{linear.name}"] = linear
        return named

    def adapters(self) -> Iterator[tuple[tuple[int, str, str], int]]:
        """Yield each trained weight: its layer, its linear and A or B, and its elements."""
        wanted = {name.removesuffix("_proj") for name in self.targets}
        for layer in range(self.dimensions.num_layers):
            for key, linear in self.linears().items():
                if "all-linear" in wanted or linear.name.removesuffix("_proj") in wanted:
                    yield (layer, key, "A"), linear.inputs * self.r
                    yield (layer, key, "B"), linear.outputs * self.r
