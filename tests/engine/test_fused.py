"""Fused norms and gated layers: the stock modules' numbers and gradients, from less memory."""

import copy

import pytest
import torch
from tiny_models import tiny_model

from lowmem_rlhf.engine.fused import fuse

# family -> (norms, gated layers, activations) that take a fused forward, of two transformer layers
TAKEN = {
    "llama": (5, 2, 0),
    "llama-tied-biased": (5, 2, 0),
    "qwen2": (5, 2, 0),
    "qwen3": (9, 2, 0),
    "mistral": (5, 2, 0),
    "phi3": (5, 0, 0),
    "olmo2": (9, 2, 0),
    "granite": (5, 2, 0),
    "gemma": (5, 2, 0),
    "gemma2": (9, 2, 0),
    "gemma3": (13, 2, 0),
    "cohere": (0, 2, 0),
    "gpt2": (0, 0, 2),
    "phi": (0, 0, 2),
    "gpt_neox": (0, 0, 0),
    "starcoder2": (0, 0, 0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fused_pair(family, dtype=torch.float32, **changes):
    """Return (fused, stock) for every module of a tiny model that took a fused forward."""
    stock = tiny_model(family, **changes).to(dtype)
    model = copy.deepcopy(stock)
    count = fuse(model, dtype)
    taken = [(m, stock.get_submodule(name)) for name, m in model.named_modules() if "forward" in vars(m)]
    assert len(taken) == count
    return taken


def kind(module):
    return "norm" if hasattr(module, "weight") else "mlp" if hasattr(module, "gate_proj") else "activation"


def width(module):
    return {"norm": lambda: module.weight.numel(), "mlp": lambda: module.gate_proj.in_features}.get(
        kind(module), lambda: 64
    )()


def run(module, x, outer):
    """Return a module's output and the gradient of its input."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(outer)
    return y.detach(), x.grad


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("family", TAKEN)
def test_which_modules_take_a_fused_forward(family):
    kinds = [kind(module) for module, _ in fused_pair(family)]
    assert tuple(map(kinds.count, ("norm", "mlp", "activation"))) == TAKEN[family]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [family for family, taken in TAKEN.items() if sum(taken)])
def test_forward_and_gradient_are_the_stock_modules(family, dtype):
    eps = torch.finfo(dtype).eps
    for number, (module, stock) in enumerate(fused_pair(family, dtype)):
        generator = torch.Generator().manual_seed(number)
        for scale in (1e-2, 1.0, 8.0):
            x, outer = (torch.randn((2, 7, width(stock)), generator=generator) for _ in range(2))
            x, outer = (scale * x).to(dtype), outer.to(dtype)
            (got, gradient), (want, stock_gradient) = run(module, x, outer), run(stock, x, outer)
            if kind(module) == "activation":  # the stock formula rounds after each of its steps
                exact, exact_gradient = run(stock, x.double(), outer.double())
                assert distance(got, exact) <= 2 * eps and distance(gradient, exact_gradient) <= 2 * eps
                continue
            assert got.dtype == want.dtype and gradient.dtype == stock_gradient.dtype
            assert distance(got, want) <= 2 * eps
            assert distance(gradient, stock_gradient) < (1e-6 if dtype == torch.float32 else 2 * eps)
            with torch.no_grad():
                assert torch.equal(module(x), got)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "quick_gelu", "mish", "silu", "gelu"])
def test_an_mlp_keeps_its_own_forward_unless_its_activation_is_known(activation):
    taken = [module for module, _ in fused_pair("llama", hidden_act=activation) if kind(module) == "mlp"]
    assert len(taken) == (2 if activation in ("silu", "gelu", "gelu_new") else 0)


class Residual(torch.nn.Module):
    """An MLP of the known children whose forward adds its input."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(64, 96), torch.nn.Linear(64, 96)
        self.down_proj, self.act_fn = torch.nn.Linear(96, 64), torch.nn.SiLU()

    def forward(self, x):
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ShiftedRMSNorm(torch.nn.Module):
    """A norm of the known name that scales by 2 + weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.zeros(64)), 1e-6

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], 2 + self.weight, self.eps)


@pytest.mark.parametrize("lookalike", [Residual, ShiftedRMSNorm])
def test_a_module_that_only_looks_like_one_keeps_its_own_forward(lookalike):
    module = lookalike().requires_grad_(False)
    assert fuse(module, torch.float32) == 0
    assert "forward" not in vars(module)


def kept_bytes(module, x):
    """Return the bytes of the storages that a forward pass keeps for its backward pass, x and weights aside."""
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t  # alive, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_less_is_kept_for_the_backward_pass(dtype, family):
    for module, stock in fused_pair(family, dtype):
        x = torch.randn(16, width(stock)).to(dtype).requires_grad_()
        ours, theirs = kept_bytes(module, x), kept_bytes(stock, x)
        if kind(module) != "mlp":
            once = 4 * width(stock) if family == "gemma3" else 0  # 1 + weight, which is not made for each pass
            assert ours <= once and ours < theirs  # x alone
        else:
            assert ours == 2 * 16 * stock.gate_proj.out_features * x.element_size() < theirs  # gate and up
