"""An adapter as a GGUF, which llama.cpp's server takes when it is started (--lora).

Source: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp: ``NAME.lora_a`` (r, in) and ``NAME.lora_b``
(out, r) beside the name of a weight, whose rows are changed as the weight's are; an alpha of 0 means the scale 1.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_rlhf.architecture.families import family_of
from lowmem_rlhf.engine.gguf_changes import TRANSPOSED, parts_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import temp_path
from lowmem_rlhf.rollout.server.adapter import PlainAdapter


def save_gguf_adapter(adapter: PlainAdapter, file: Path, config: Any) -> None:
    """Write an adapter.

    Args:
        config: transformers' of the base.

    Raises:
        UserError: llama.cpp has no such model, or keeps a layer's weight in a way that an adapter does not follow.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    layout = family_of(config.model_type).gguf
    if layout is None or layout.metadata is None:
        raise UserError(
            f"generation.engine: llama_cpp is not for a base of type {config.model_type}, whose adapter is not written "
            "as a GGUF here; take vllm, or leave it at auto"
        )
    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == layout.name)
    names = get_tensor_name_map(arch, int(config.num_hidden_layers))
    target = temp_path(file)
    writer = GGUFWriter(target, layout.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for layer, (a, b) in adapter.layers.items():
        weight = f"{layer.removeprefix('base_model.model.')}.weight"
        [part, *more] = parts_of(weight, (b.shape[0], a.shape[1]), config, layout)
        by_rows = [change for change in part.changes if change is not TRANSPOSED]  # an adapter is never stored so
        known = part.name if part.name.startswith("blk.") else names.get_name(part.name, try_suffixes=(".weight",))
        if more or part.rows or known is None or (by_rows and not layout.pairs_rows):
            raise UserError(
                f"generation.engine: llama_cpp takes no adapter beside {weight}; leave it out of lora.target_modules, "
                "or take vllm, or leave it at auto"
            )
        for change in by_rows:
            b = change.apply(b)
        writer.add_tensor(f"{known}.lora_a", _numbers(a))
        writer.add_tensor(f"{known}.lora_b", _numbers(b))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    target.replace(file)


def _numbers(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    return tensor.contiguous().numpy()
