"""What an export takes, in bytes of memory and of disk: pure arithmetic, without torch.

An export merges tensor by tensor in host memory, and models are compared, one after another: the run's base is loaded
as in training, then by stock transformers and peft, then perhaps without quantization, and at last the export as it is
stored. So its peak is the largest of these parts, not their sum.
"""

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.planning.memory.resident import LOGITS_BYTES, MIB, block_weight_bytes, embedding_bytes

WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4}
# a weight; of q5_k_m and q4_k_m about, with their q6_k part
GGUF_BYTES = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q6_k": 210 / 256, "q5_k_m": 0.72, "q4_k_m": 0.61}
SIDE_FILE_BYTES = 32 * MIB  # tokenizer, chat template, card; Gemma's vocabulary is the largest
PIECE_BYTES = 96 * MIB  # rows that are calculated with, and what an allocator keeps of them; measured
QUANTIZING_BYTES = 24 * MIB  # a piece of `export.merging.dequantized` in bitsandbytes' hands: 24 bytes a weight


def export_disk_bytes(dims: ModelDimensions, dtype: str = "float16", kind: str | None = None) -> int:
    """Return the bytes of disk that an export needs while it is made.

    Args:
        dtype: of merged weights.
        kind: of a GGUF that is made of them (f16, bf16, q8_0, q4_k_m); both lie on the disk for a time.
    """
    merged = dims.num_parameters * WIDTHS[dtype] + SIDE_FILE_BYTES
    return merged if kind is None else merged + round(dims.num_parameters * GGUF_BYTES[kind])


def merge_memory_bytes(dims: ModelDimensions, quantization: str, compute_dtype: str) -> int:
    """Return the bytes of host memory that merging takes beside the program itself.

    Some rows, whatever the model's size. Onto quantized weights also one linear layer: as stored (2 bytes a weight),
    its 4-bit codes (0.5), and the numbers they stand for (of int8 in fp32).
    """
    if quantization == "none":
        return PIECE_BYTES
    dense = 4 if quantization == "int8" else 0.5 + WIDTHS[compute_dtype]
    return PIECE_BYTES + QUANTIZING_BYTES + round((2 + dense) * dims.largest_linear)


def export_memory_bytes(
    dims: ModelDimensions,
    quantization: str,
    compute_dtype: str,
    dtype: str = "float16",
    onto: str = "quantized",
    kind: str | None = None,
) -> dict[str, int]:
    """Return the bytes of each part of an export, logits that are kept of the models before it included.

    On the device: ``live_policy``; ``stock_policy``, the same base in stock transformers with the adapter in stock
    peft; ``original_policy``, that on the unquantized base in fp32, which is left out where there is no room for it;
    and ``loaded_again``, the export on a device with room for it (it is read partly from the disk where there is none).
    On the host: ``merge``, and ``gguf_loaded_again``, a GGUF's numbers in fp32, left out where there is no room.

    Args:
        quantization, compute_dtype: of the run's base.
        dtype, onto: of the export.
        kind: of a GGUF that is made of it.
    """
    width = WIDTHS[compute_dtype]
    base = block_weight_bytes(dims, quantization, width) + embedding_bytes(dims, width)
    wide = base + embedding_bytes(dims, 4 - width)
    # two models' with either arithmetic, a third's, its own
    compared_logits = (5 if onto == "quantized" else 7) * LOGITS_BYTES
    parts = {
        "merge": merge_memory_bytes(dims, quantization if onto == "quantized" else "none", compute_dtype),
        "live_policy": wide + 4 * LOGITS_BYTES,
        "stock_policy": wide + 6 * LOGITS_BYTES,
        "original_policy": dims.num_parameters * 4 + compared_logits,
        "loaded_again": dims.num_parameters * WIDTHS[dtype] + compared_logits,
        "gguf_loaded_again": dims.num_parameters * 4 + compared_logits,
    }
    if onto == "quantized":
        del parts["original_policy"]
    if kind is None:
        del parts["gguf_loaded_again"]
    return parts
