"""What one model type computes here against stock transformers with the stock adapter: the columns of one row.

Stock is the same folder loaded by AutoModelForCausalLM with the adapter in stock peft, each sequence alone, all logits
at once. How much stock differs from itself, alone against padded on the right, is measured too.
"""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from architecture_measures import (
    CPU,
    Logps,
    cosine,
    fill_adapter,
    gradient_difference,
    gradients,
    largest,
    load_stock,
    ours_at_once,
    ragged,
    sampled,
    sizes,
    stock_alone,
    stock_batched,
    weights_like,
    with_gradients,
)

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.errors import LowmemError
from lowmem_rlhf.rollout.stock_check import checked, is_tested

LORA = {"r": 4, "lora_alpha": 8}
EXACT = 1e-3  # bound of differences in fp32: of log-probs, and of a tensor's gradient relative to its norm
NOISE, SLACK = 3.0, 0.005  # in 16 bits: no more than so many times stock's own distance from fp32, and a little

Findings = dict[str, Any]


class StockFails(Exception):
    """Stock transformers cannot run the model, or not the same way twice."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


def told(error: BaseException) -> str:
    """Return an error on one line, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"


def attention_layers(stock: Any) -> list[str]:
    """Return the names of linear layers that occur in attention only: what a user names where all-linear is refused."""
    inside: set[str] = set()
    outside: set[str] = set()
    blocks = tuple(n for n, m in stock.named_modules() if "attention" in type(m).__name__.lower())
    for name, module in stock.named_modules():
        if hasattr(module, "in_features") or hasattr(module, "nf"):
            place = inside if any(name.startswith(f"{block}.") for block in blocks) else outside
            place.add(name.rsplit(".", 1)[-1])
    return sorted(name for name in inside - outside if not name.isdigit())


def load_ours(folder: Path, quantization: str, dtype: str, targets: str | list[str] = "all-linear") -> SharedBase:
    """Load a folder as a run does, the check at load included."""
    base = SharedBase.load(str(folder), CPU, quantization, dtype, **LORA, target_modules=targets)
    if not is_tested(base.model):
        checked(base)
    return base


def exactness(folder: Path, scratch: Path, findings: Findings) -> None:
    """Find what fp32 shows: the layout, log-probs, gradients, sampled log-probs, and stock's own noise.

    Args:
        scratch: a folder for the adapter, which is made here.

    Raises:
        StockFails: see there.
    """
    groups = ragged()
    stock, untouched = _stock_without_adapter(folder, groups, findings)
    base = _load_with_targets(folder, stock, findings)
    findings["stage"] = "adapter"
    fill_adapter(base)
    base.save_adapter(scratch)
    weights = weights_like(groups)
    try:
        stock = with_adapter(stock, scratch)
        want, want_gradients = with_gradients(stock, stock_alone, groups, weights)
        _, again = with_gradients(stock, stock_batched, groups, weights)
    except Exception as error:
        raise StockFails(f"the adapter in stock peft: {told(error)}") from error
    findings["stock_gradients"] = gradient_difference(again, want_gradients)
    findings["adapter_effect"] = largest(want, untouched)
    findings["stage"] = "log-probs"
    with torch.no_grad(), base.role(REFERENCE):
        findings["logps"] = largest(ours_at_once(base, groups), untouched)
    findings["gradients"] = 0.0
    for checkpointing, tokens in ((False, 1000), (True, 40)):
        base.set_gradient_checkpointing(checkpointing)
        base.peft.zero_grad()
        with base.role(POLICY):
            got = ours_at_once(base, groups, weights, tokens)
        findings["logps"] = max(findings["logps"], largest(got, want))
        findings["gradients"] = max(findings["gradients"], gradient_difference(gradients(base.peft), want_gradients))
    findings["stage"] = "sampled"
    drawn, logps = sampled(base, groups)
    with torch.no_grad():
        findings["sampled"] = largest(logps, stock_alone(stock, drawn))


def _stock_without_adapter(folder: Path, groups: Sequence[Group], findings: Findings) -> tuple[Any, Logps]:
    """Return the stock model in fp32 and its log-probs; find how far they are from those of a padded batch."""
    try:
        stock = load_stock(folder, "none", "float32")
        with torch.no_grad():
            alone = stock_alone(stock, groups)
            findings["stock_self"] = largest(stock_batched(stock, groups), alone)
    except Exception as error:
        raise StockFails(told(error)) from error
    if not findings["stock_self"] <= EXACT:
        raise StockFails(f"alone and in a padded batch its log-probs differ by {findings['stock_self']:.2g}")
    return stock, alone


def _load_with_targets(folder: Path, stock: Any, findings: Findings) -> SharedBase:
    """Load a folder with adapters on all linear layers, or where that is refused on those of the attention."""
    findings["stage"] = "load"
    try:
        base = load_ours(folder, "none", "float32")
    except LowmemError as refusal:
        targets = attention_layers(stock)
        if "target_modules" not in str(refusal) or not targets:
            raise
        findings["all_linear"], findings["targets"] = one_line(refusal), targets
        base = load_ours(folder, "none", "float32", targets)
    findings["way"] = "packed" if base.packable else "padded"
    findings["note"] = base.note
    return base


def rounded(folder: Path, scratch: Path, findings: Findings, quantization: str, dtype: str, targets: Any) -> None:
    """Find what a 16-bit dtype or a quantization shows, against the same (quantized) weights in fp32.

    ``noise`` is how far stock in that dtype is from stock in fp32, or alone from batched; ``logps`` and ``sampled`` is
    how far ours is from that fp32. Each is a mean and a median over tokens: where a router turns to another expert, a
    few tokens differ by much, in stock as here.

    Raises:
        StockFails: see there.
    """
    groups = ragged()
    try:
        truth = with_adapter(load_stock(folder, quantization, "float32"), scratch)
        stock = with_adapter(load_stock(folder, quantization, dtype), scratch)
        weights = weights_like(groups)
        want, want_gradients = with_gradients(truth, stock_alone, groups, weights)
        with torch.no_grad():
            alone = stock_alone(stock, groups)
            noise = sizes(alone, want, stock_batched(stock, groups))
    except Exception as error:
        raise StockFails(told(error)) from error
    findings["experts"] = any("expert" in name for name, _ in stock.named_parameters())
    findings["stage"] = "load"
    base = load_ours(folder, quantization, dtype, targets)
    base.load_adapter(scratch)
    findings["stage"] = "log-probs"
    base.set_gradient_checkpointing(True)
    with base.role(POLICY):
        got = ours_at_once(base, groups, weights)
    findings |= {"noise": noise, "logps": sizes(got, want), "cosine": cosine(gradients(base.peft), want_gradients)}
    findings["stage"] = "sampled"
    for way, dequantize in (("sampled", False), ("sampled_dequantized", True))[: 1 + (quantization == "nf4")]:
        drawn, logps = sampled(base, groups, dequantize)
        with torch.no_grad():
            exact = stock_alone(truth, drawn)
            again = sizes(stock_alone(stock, drawn), exact)
        findings[f"{way}_noise"] = [max(pair) for pair in zip(noise, again, strict=True)]
        findings[way] = sizes(logps, exact)


def with_adapter(model: Any, folder: Path) -> Any:
    """Put an adapter on a stock model with stock peft; its quantized layers are told that they train.

    In evaluation bitsandbytes may reorder 4-bit weights in place for a CPU, and the gradient is wrong from then on.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    for module in adapted.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
    return adapted


def ended(findings: Findings, run: Callable[[], None]) -> Findings:
    """Run a part that fills ``findings``; add a verdict and its reason where it did not end well."""
    try:
        run()
        findings.pop("stage", None)
    except LowmemError as error:
        findings |= {"verdict": "refused", "why": one_line(error)}
    except StockFails as error:
        findings |= {"verdict": "stock_fails", "why": str(error)}
    except Exception as error:
        findings |= {"verdict": "traceback", "why": told(error), "traceback": traceback.format_exc()[-2500:]}
    return findings


def off(findings: Findings) -> list[str]:
    """Return which of a part's numbers are beyond their bounds.

    In 16 bits the median counts, and of a model without experts the mean as well: another expert for one token moves
    the mean of few tokens by more than rounding does.
    """
    if "noise" not in findings:
        bounds = {"logps": EXACT, "gradients": max(EXACT, 10 * findings.get("stock_gradients", 0)), "sampled": EXACT}
        return [key for key, bound in bounds.items() if not findings.get(key, 0) <= bound]
    counted = slice(1, 2) if findings["experts"] else slice(2)
    ways = [("logps", "noise"), *((way, f"{way}_noise") for way in ("sampled", "sampled_dequantized"))]
    return [
        w for w, noise in ways if w in findings and any(map(_beyond, findings[w][counted], findings[noise][counted]))
    ]


def _beyond(distance: float, noise: float) -> bool:
    return not distance <= NOISE * noise + SLACK
