"""Experts in NF4: stacked parameters that are quantized while they are loaded, and multiplied one expert at a time.

bitsandbytes' layers stand for ``nn.Linear`` and pass stacked parameters by. Here a stack becomes 4-bit codes with one
fp32 scale for 64 weights (no second quantization of the scales, so that each expert stands by itself), and the stock
forward, which reads one expert after another, gets weights that are made dense for their product alone. Experts are
frozen: a gradient flows through them to their input only, which keeps nothing. They may lie in host memory; then the
codes of one are copied to the device for its product.
"""

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from lowmem_rlhf.architecture.experts import expert_stacks
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities

METHOD = "nf4_with_experts"  # the name of the quantizer below in transformers' table
BLOCK = 64


@register_quantizer(METHOD)
class Nf4WithExperts(Bnb4BitHfQuantizer):
    """bitsandbytes' NF4 as transformers loads it, and stacked experts beside it."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Say whether a parameter is quantized: a linear layer's weight, or a stack of experts."""
        from bitsandbytes.nn import Params4bit

        module, name = get_module_from_name(model, param_name)
        stack = isinstance(getattr(module, name, None), Params4bit) and getattr(module, "source_cls", None) is STACKED
        return stack or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        """Return what quantizes a tensor; experts that are to lie in host memory go there right away."""
        operation = super().get_quantize_ops()
        if getattr(self.quantization_config, "offload_experts", False):
            quantize = operation.convert
            operation.convert = lambda values, **keywords: _offloaded(quantize(values, **keywords), keywords["model"])
        return operation

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        from bitsandbytes.nn import Params4bit

        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        for module, name in expert_stacks(model):
            stack = getattr(module, name)
            if stack[0].numel() % BLOCK == 0:
                empty = torch.empty(stack.shape, dtype=stack.dtype, device="meta")
                codes = Params4bit(
                    empty, requires_grad=False, compress_statistics=False, quant_type="nf4", blocksize=BLOCK
                )
                setattr(module, name, codes)
                module.source_cls = STACKED
                module.stack_shapes = {**getattr(module, "stack_shapes", {}), name: tuple(stack.shape)}


def _offloaded(quantized: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return quantized parameters, the codes and scales of stacks in host memory, pinned where that helps."""
    from bitsandbytes.nn import Params4bit

    moved = {}
    for path, parameter in quantized.items():
        if get_module_from_name(model, path)[0].source_cls is STACKED:
            pin, state = capabilities(parameter.device).pinned_copies, parameter.quant_state
            codes, state.absmax = (x.pin_memory() if pin else x for x in (parameter.data.cpu(), state.absmax.cpu()))
            kept = {name: getattr(parameter, name) for name in ("blocksize", "compress_statistics", "quant_type")}
            parameter = Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True, **kept)
        moved[path] = parameter
    return moved


class STACKED(nn.Linear):
    """What a stack of experts stands for where the loader asks for the class that was replaced."""


def split_experts(model: nn.Module) -> int:
    """Let the modules whose experts are in NF4 multiply with them one by one; return how many there are."""
    stacks: dict[nn.Module, dict[str, ExpertStack]] = {}
    for module, name in expert_stacks(model):
        if getattr(getattr(module, name), "quant_state", None) is not None:
            stacks.setdefault(module, {})[name] = ExpertStack(getattr(module, name))
    for module, named in stacks.items():
        stock = inspect.unwrap(type(module).forward)
        module.forward = partial(stock, _Stand(module, named))  # type: ignore[method-assign]
    return len(stacks)


class _Stand:
    """A module's ``self`` in its stock forward, whose stacked parameters give one expert at a time."""

    def __init__(self, module: nn.Module, stacks: "dict[str, ExpertStack]") -> None:
        self.__dict__.update(stacks)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class ExpertStack:
    """The 4-bit codes of (E, out, in) weights; indexed, the weight of one expert."""

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter

    def __getitem__(self, expert: Any) -> "ExpertWeight":
        return ExpertWeight(self, int(expert))

    @torch.no_grad()
    def dense(self, expert: int, device: torch.device) -> torch.Tensor:
        """Return an expert's weight (out, in) in the compute dtype on a device."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = self.parameter.quant_state
        shape = state.shape[1:]
        size, flat = shape.numel(), torch.Size((shape.numel() // BLOCK, BLOCK))  # on a CPU rows of whole blocks only
        scales = state.absmax[expert * size // BLOCK : (expert + 1) * size // BLOCK]
        codes = self.parameter.data.view(-1)[expert * size // 2 : (expert + 1) * size // 2]
        scales, codes, code = (x.to(device, non_blocking=True) for x in (scales, codes, state.code))
        one = QuantState(absmax=scales, shape=flat, code=code, blocksize=BLOCK, quant_type="nf4", dtype=state.dtype)
        return dequantize_4bit(codes.view(-1, 1), one).view(shape)


class ExpertWeight:
    """One expert's weight, which torch's products take in place of a tensor."""

    def __init__(self, stack: ExpertStack, expert: int) -> None:
        self.stack, self.expert = stack, expert

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute ``F.linear(x, weight)`` or ``x @ weight``."""
        x, weight, *bias = args
        if function is F.linear and isinstance(weight, ExpertWeight):
            y = _Product.apply(x, weight.stack, weight.expert, False)
            bias = bias or [(kwargs or {}).get("bias")]
            return y if bias[0] is None else y + bias[0]
        if function in (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__):
            return _Product.apply(x, weight.stack, weight.expert, True)
        raise UserError(
            f"experts in NF4 are multiplied one by one, and this model has another use for them ({function.__name__}); "
            "take hardware.quantization=int8 or none"
        )

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self.stack, self.expert, True)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """``x W^T``, or ``x W`` of a transposed weight, with W made dense in either direction."""

    @staticmethod
    def forward(ctx, x, stack, expert, transposed):  # type: ignore[no-untyped-def]
        ctx.of = (stack, expert, transposed)
        weight = stack.dense(expert, x.device).to(x.dtype)
        return x @ (weight if transposed else weight.t())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        stack, expert, transposed = ctx.of
        weight = stack.dense(expert, grad.device).to(grad.dtype)
        return grad @ (weight.t() if transposed else weight), None, None, None
