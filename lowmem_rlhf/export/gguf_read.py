"""A GGUF's numbers back in the transformers model that it was made of, to be held against the live policy.

transformers reads GGUF files itself, but not all that they say: of Gemma the norms, of Llama 3.1 and later the rotary
scaling, of Qwen3 the width of a head. Here the configuration comes from the merged folder and only the numbers from the
GGUF, so what is compared is what quantization did to the weights.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.gguf_families import describe
from lowmem_rlhf.export.gguf_tensors import plan_tensors
from lowmem_rlhf.export.shards import read_tensors
from lowmem_rlhf.model.whole import load_whole


@torch.no_grad()
def read_model(file: Path, folder: Path) -> Any:
    """Return the folder's model (fp32, on the CPU) with the numbers of a GGUF that was made of it.

    Raises:
        RunError: the GGUF lacks a tensor or has one of another shape.
        UserError: the family is not one that a GGUF is written of here.
    """
    from transformers import AutoModelForCausalLM

    model = load_whole(AutoModelForCausalLM, folder, str(folder), dtype=torch.float32, device_map={"": "cpu"})
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    stored = read_tensors(folder)
    config, weights = model.config, model.state_dict()
    for plan in plan_tensors(stored, config, describe(config), "f32", config.vocab_size):
        if plan.source is None:
            continue
        tensor = found.get(plan.name)
        if tensor is None or tuple(int(n) for n in tensor.shape[::-1]) != plan.shape:
            raise RunError(f"{file.name} holds no {plan.name} of the shape {plan.shape}: it is not of this model")
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).view(plan.shape)
        restored = plan.restore(numbers)
        weights[plan.origin][: len(restored)].copy_(restored)
    return model.eval()
