"""A GGUF's numbers read back into the transformers model that it was made of, for the comparison with the live policy.

transformers reads GGUF files itself, but gets parts of some wrong: Gemma's norms, the rotary scaling of Llama 3.1 and
later, the width of a head in Qwen3. Here the configuration comes from the merged folder and only the numbers from the
GGUF, so the comparison shows what quantization did to the weights. The numbers themselves are compared as well, row by
row; they may differ by what their kind can explain.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from lowmem_rlhf.engine.whole import load_whole
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.gguf.metadata import describe
from lowmem_rlhf.export.gguf.tensors import Tensor, plan_tensors
from lowmem_rlhf.export.proof.storage import furthest_row
from lowmem_rlhf.export.shards import read_tensors

# llama.cpp's names of types whose steps we know; another one (a user's own converter) is left to the predictions
KINDS = {
    "F16": "float16",
    "BF16": "bfloat16",
    "Q8_0": "q8_0",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q5_K": "q5_k",
    "Q4_K": "q4_k",
    "Q6_K": "q6_k",
}
SHIFTED = 1e-6  # relative error of a norm's weight that 1 was added to: a few times fp32's rounding


@torch.no_grad()
def read_model(file: Path, folder: Path) -> Any:
    """Return the folder's model (fp32, on the CPU) with the numbers of a GGUF that was made of it.

    Raises:
        RunError: the GGUF lacks a tensor or has one of another shape.
        UserError: no GGUF of this model family is written here.
    """
    from transformers import AutoModelForCausalLM

    model = load_whole(AutoModelForCausalLM, folder, str(folder), dtype=torch.float32, device_map={"": "cpu"})
    weights = model.state_dict()
    for plan, tensor in _tensors(file, folder, model.config):
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).view(plan.shape)
        restored = plan.restore(numbers)
        first = plan.part[0] if plan.part else 0
        rows = weights[plan.origin][first : first + len(restored)]
        rows.copy_(restored.view_as(rows))  # a convolution's kernels have one dimension less in the file
    return model.eval()


@torch.no_grad()
def check_numbers(file: Path, folder: Path) -> float:
    """Compare every row of a GGUF with the model that it was made of, some rows in memory at a time.

    Returns:
        The error of the row that is furthest off, root mean square, in steps of its codes: rounding makes about 0.3.

    Raises:
        RunError: a row is further off than a step, so it holds other numbers; or as `read_model`.
        UserError: as `read_model`.
    """
    from transformers import AutoConfig

    furthest = 0.0
    for plan, tensor in _tensors(file, folder, AutoConfig.from_pretrained(folder)):
        kind, begin = KINDS.get(tensor.tensor_type.name), 0
        for part in plan.rows():
            rows = tensor.data if len(part) == plan.shape[0] else tensor.data[begin : begin + len(part)]
            begin += len(part)
            part = part.reshape(len(part), *plan.shape[1:])
            stored = torch.from_numpy(dequantize(rows, tensor.tensor_type).copy()).view(part.shape)
            off = _steps_off(stored, part.float(), kind, tensor.tensor_type.name)
            if not off <= 1.0:
                raise RunError(
                    f"{file.name} holds other numbers for {plan.origin} than the merged model: a row is off by "
                    f"{off:.2g} times what {tensor.tensor_type.name} can explain; nothing was kept"
                )
            furthest = max(furthest, off)
    return furthest


def _steps_off(stored: torch.Tensor, wanted: torch.Tensor, kind: str | None, name: str) -> float:
    stored, wanted = (one.reshape(1, -1) if one.ndim < 2 else one for one in (stored, wanted))
    if kind is not None:
        return furthest_row(stored, wanted, kind)
    if name == "F32":
        return float(((stored - wanted).abs() / (SHIFTED * (1 + wanted.abs()))).max())
    return 0.0 if torch.isfinite(stored).all() else float("nan")


def _tensors(file: Path, folder: Path, config: Any) -> Iterator[tuple[Tensor, Any]]:
    """Yield each tensor that a GGUF of the model must hold, as planned and as stored.

    Raises:
        RunError, UserError: as `read_model`.
    """
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for plan in plan_tensors(read_tensors(folder), config, describe(config), "f32", config.vocab_size):
        if plan.source is None:
            continue
        tensor = tensors.get(plan.name)
        if tensor is None or tuple(int(n) for n in tensor.shape[::-1]) != plan.shape:
            raise RunError(f"{file.name} holds no {plan.name} of the shape {plan.shape}: it is not of this model")
        yield plan, tensor
