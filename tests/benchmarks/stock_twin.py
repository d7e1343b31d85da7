"""A step of stock transformers and peft on the CPU beside the same step on sizes. Not a test module."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from stock_memory.allocator import Block
from stock_memory.simulated import SimTensor
from stock_memory.stock_run import StockRun
from stock_memory.stock_step import StockStep
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.hardware.live_bytes import LiveBytes

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 640,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


class ExactAllocator:
    """Hands out exactly what is asked for: what remains of a difference is the step's."""

    def __init__(self) -> None:
        self.allocated = self.peak_allocated = self.reserved = 0

    def allocate(self, size: int) -> Block:
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return Block(0, size, True)

    def release(self, block: Block) -> None:
        self.allocated -= block.size

    def reset_peaks(self) -> None:
        self.peak_allocated = self.allocated


class OnCpu(StockStep):
    """The same step as torch's CPU kernels take it, under a dispatch mode."""

    adds_in_place = False
    fused_softmax = False
    softmax_scratch = False

    def workspace(self) -> None:
        pass

    def dropout(self, x: SimTensor) -> SimTensor:
        return x  # another kernel; the configurations of the tests drop nothing


def model_of(run: StockRun, config: dict[str, Any], folder: Any) -> torch.nn.Module:
    """Return the model with adapters, prepared as people prepare it."""
    torch.manual_seed(0)
    kind = dict(config)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.pop("model_type"), **kind))
    dtype = getattr(torch, run.precision)
    model = built.to(dtype)
    if run.quantization != "none":
        model.save_pretrained(folder)
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=run.double_quantization,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=four_bit)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=run.gradient_checkpointing)
    model.set_attn_implementation(run.attention)
    model.config.use_cache = False
    short = {"q", "k", "v", "o", "qkv", "gate", "up", "down"}
    names = [f"{x}_proj" if x in short else x for x in run.targets]
    model = get_peft_model(model, LoraConfig(r=run.r, target_modules=names[0] if names == ["all-linear"] else names))
    model.enable_input_require_grads()
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def measured(run: StockRun, config: dict[str, Any], folder: Any) -> tuple[int, int]:
    """Return the peaks of live bytes of the forward pass and of the whole step, above what was there before."""
    model = model_of(run, config, folder)
    ids = torch.randint(1, run.dimensions.vocab_size, (run.batch_size, run.sequence_length))
    mask = torch.ones_like(ids)
    counter = LiveBytes(scan=False)
    counter.scan()
    start = counter.current
    with counter:
        out = model(input_ids=ids, attention_mask=mask, labels=ids)
        forward = counter.peak - start
        out.loss.backward()
    return forward, counter.peak - start


def predicted(run: StockRun) -> tuple[int, int]:
    """Return the same from sizes."""
    allocator: Any = ExactAllocator()
    step = OnCpu(run, allocator)
    step.masters = {key: step.empty(count, 4) for key, count in run.adapters()}
    start = allocator.allocated
    _, loss = held = step.forward()
    forward = allocator.peak_allocated - start
    step.backward_from(loss)
    del held
    return forward, allocator.peak_allocated - start


def run_of(config: dict[str, Any], batch_size: int, sequence_length: int, **settings: Any) -> StockRun:
    return StockRun(dimensions_from_config(config, "tiny"), batch_size, sequence_length, **settings)
