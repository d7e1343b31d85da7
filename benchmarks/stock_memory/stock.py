"""The memory of fine-tuning as most people do it: stock transformers, peft and bitsandbytes on a CUDA card.

This is not how our own engine works. It is what was measured in public, so it shows that the arithmetic is right.

Nothing is fitted to a formula for the peak. `predict` loads the model and takes two steps on tensors that are only
sizes (simulated.py, simulated_ops.py, stock_step.py), whose blocks come from torch's allocator (allocator.py). What is
alive at the peak, and how much the allocator had to reserve for it, is read off. The one free number is `AHEAD`.
"""

from collections import deque
from dataclasses import dataclass
from random import Random

from stock_memory.allocator import MIB, CachingAllocator
from stock_memory.simulated import SimTensor
from stock_memory.simulated_linears import DOUBLE_QUANT_BLOCK, NF4_BLOCK
from stock_memory.stock_run import StockRun
from stock_memory.stock_step import StockStep

from lowmem_rlhf.errors import UserError

AHEAD = 256 * MIB  # 16-bit weights, at most, that the loader's threads have on the card before they are quantized
STEPS = 2  # from the second step on, the optimizer's states and autograd's workspace are there


@dataclass(frozen=True)
class StockMemory:
    """Bytes of a run.

    Attributes:
        load: allocated after loading, preparing and adding adapters.
        forward: the peak of a forward pass.
        allocated: the peak of a step.
        reserved: what the allocator has taken from the card by then; a process has the CUDA context besides.
        parts: what `allocated` is made of, by name.
    """

    load: int
    forward: int
    allocated: int
    reserved: int
    parts: dict[str, int]


def predict(run: StockRun, capacity: int | None = None) -> StockMemory:
    """Predict the memory of a run.

    Args:
        run: the model and how it is trained.
        capacity: bytes that the process can reserve; segments that are wholly free are given back before it is passed.

    Raises:
        UserError: the optimizer is not known here, or no layer has an adapter.
        RunError: the run does not fit in ``capacity``.
    """
    allocator = CachingAllocator(capacity)
    step = StockStep(run, allocator)
    weights = load(step)
    loaded = allocator.allocated
    for _ in range(STEPS):
        step.reset_peak()
        logits, loss = step.forward()
        forward = allocator.peak_allocated
        step.backward_from(loss)  # the caller still holds the logits: `outputs`
        allocated, parts = allocator.peak_allocated, step.bytes_at_peak
        del logits, loss
        step.optimizer_step()
    del weights
    return StockMemory(loaded, forward, max(allocated, allocator.peak_allocated), allocator.reserved, parts)


def load(step: StockStep) -> list[SimTensor]:
    """Take the memory of the weights and the adapters, in the order in which they arrive.

    - 16-bit: ``model.to("cuda")`` takes one parameter after the other.
    - NF4 and int8: the loader's threads bring 16-bit weights, one after the other is quantized (two weights in a byte
      with a float32 scale for each `NF4_BLOCK` of them, or a byte each with a scale for each output) and let go. How
      far the threads are ahead changes from run to run, and with it which holes the weights fall into. Then
      ``prepare_model_for_kbit_training`` makes a float32 copy of every other parameter.
    - Adapters are float32 whatever the base is.
    """
    run, sizes = step.run, step.sizes
    head = [] if sizes.tied else [sizes.embedding_parameters // 2]
    small = sizes.other_parameters // (2 * sizes.num_layers)
    arriving: list[tuple[bool, int]] = [(False, sizes.vocab_size * sizes.hidden_size)]
    for _ in range(sizes.num_layers):
        arriving += [(True, linear.inputs * linear.outputs) for linear in sizes.linears] + [(False, small)] * 2
    arriving += [(False, count) for count in head]
    with step.counted_as("weights"):
        if run.quantization == "none":
            weights = [step.empty(count, run.compute_width) for _, count in arriving]
        else:
            weights = _quantized(step, arriving)
        weights.append(step.empty(1, 1))  # rotary frequencies
        weights.append(step.empty(1, 1))
    with step.counted_as("adapters"):
        step.masters = {key: step.empty(count, 4) for key, count in run.adapters()}
    if not step.masters:
        raise UserError(f"targets: got {', '.join(run.targets)}; the linear layers are {', '.join(step.linears)}")
    return weights


def _quantized(step: StockStep, arriving: list[tuple[bool, int]]) -> list[SimTensor]:
    draw, width, weights = Random(0), step.run.compute_width, []
    plain: list[SimTensor] = []
    waiting: deque[tuple[bool, SimTensor]] = deque()
    ahead = 0
    for quantizable, count in arriving:
        waiting.append((quantizable, step.empty(count, width)))
        ahead += width * count
        limit = draw.uniform(AHEAD / 2, AHEAD)
        while ahead > limit:
            ahead -= width * waiting[0][1].count
            weights += _placed(step, *waiting.popleft(), plain)
    while waiting:
        weights += _placed(step, *waiting.popleft(), plain)
    while plain:
        weights.append(step.like(plain[0], 4) if width == 2 else plain[0])
        del plain[0]
    return weights


def _placed(step: StockStep, quantizable: bool, weight: SimTensor, plain: list[SimTensor]) -> list[SimTensor]:
    if quantizable:
        return _quantize(step, weight.count)
    plain.append(weight)
    return []


def _quantize(step: StockStep, count: int) -> list[SimTensor]:
    if step.run.quantization == "int8":
        return [step.empty(count, 1), step.empty(count // step.sizes.hidden_size, 4)]
    scales = step.empty(count // NF4_BLOCK, 4)
    codes = [step.empty(count // 2, 1), step.empty(16, 4)]
    if not step.run.double_quantization:
        return [scales, *codes]
    shifted = step.like(scales)
    nested = step.empty(scales.count // DOUBLE_QUANT_BLOCK + 1, 4)
    eight_bit = [step.empty(scales.count, 1), nested, step.empty(256, 4), step.empty(1, 4)]
    del shifted, scales
    return [*codes, *eight_bit]
