"""What one model type computes here against stock transformers with the stock adapter: the columns of one row.

Stock is the same folder loaded by AutoModelForCausalLM with the adapter in stock peft, each sequence alone, all logits
at once. How much stock differs from itself, alone against padded on the right, is measured too.
"""

import gc
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_architectures import EOS, TOKENS

from lowmem_rlhf.errors import LowmemError
from lowmem_rlhf.model.base import SharedBase
from lowmem_rlhf.model.packing import Group
from lowmem_rlhf.model.roles import POLICY, REFERENCE

CPU = torch.device("cpu")
SHAPES = ((13, (9, 1, 14)), (6, (5, 11, 2)))  # prompt and completions, in tokens
TILE = 7
EXACT = 1e-3  # of log-probs in fp32
LORA = {"r": 4, "lora_alpha": 8}

Logps = dict[int, torch.Tensor]


class Refused(Exception):
    """The package said no, in a sentence."""


class StockFails(Exception):
    """Stock transformers cannot run the model, or not the same way twice."""


def told(error: BaseException) -> str:
    """Return an error on one line, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"


def ragged(seed: int = 0) -> list[Group]:
    """Return two prompts of unequal length with three completions each, of unequal length too."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    groups: list[Group] = []
    for prompt, completions in SHAPES:
        ids = [
            torch.randint(EOS + 1, TOKENS, (n,), generator=generator, device="cpu").tolist()
            for n in (prompt, *completions)
        ]
        first = sum(len(group.rows) for group in groups)
        groups.append(Group(ids[0], ids[1:], list(range(first, first + len(completions)))))
    return groups


def rows_of(groups: Sequence[Group]) -> list[tuple[int, list[int], list[int]]]:
    """Return (row, prompt, completion) of every completion."""
    return [
        (row, list(group.prompt), list(completion))
        for group in groups
        for row, completion in zip(group.rows, group.completions, strict=True)
    ]


def picked(logits: torch.Tensor, prompt: int, completion: Sequence[int]) -> torch.Tensor:
    """Return a completion's log-probs (n,) from the logits (T, V) of its sequence."""
    predicting = logits[prompt - 1 : prompt - 1 + len(completion)].float().log_softmax(-1)
    return predicting.gather(-1, torch.tensor(completion, dtype=torch.long, device="cpu")[:, None]).squeeze(-1)


def stock_alone(model: Any, groups: Sequence[Group]) -> Logps:
    """Return log-probs by row, each sequence alone."""
    found: Logps = {}
    for row, prompt, completion in rows_of(groups):
        ids = torch.tensor([[*prompt, *completion]], dtype=torch.long, device="cpu")
        found[row] = picked(model(input_ids=ids, use_cache=False).logits[0], len(prompt), completion)
    return found


@torch.no_grad()
def stock_batched(model: Any, groups: Sequence[Group]) -> Logps:
    """Return log-probs by row, all sequences in one batch, padded on the right under a mask."""
    rows = rows_of(groups)
    longest = max(len(prompt) + len(completion) for _, prompt, completion in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    for i, (_, prompt, completion) in enumerate(rows):
        ids[i, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion], dtype=torch.long, device="cpu")
        mask[i, : len(prompt) + len(completion)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return {row: picked(logits[i], len(p), c) for i, (row, p, c) in enumerate(rows)}


def ours_at_once(base: SharedBase, groups: Sequence[Group], weights: Logps | None = None, tokens: int = 1000) -> Logps:
    """Return log-probs by row of the training pass in this role; with weights, add their sum's gradients."""
    from lowmem_rlhf.training.update import packed_logprobs

    found: Logps = {}
    for part in base.layout.cut(groups, tokens):
        batch = base.layout.lay_out(part, CPU)
        values, _ = packed_logprobs(base, batch, 1.0, TILE)
        if weights is not None:
            (values * torch.cat([weights[row] for row in batch.rows])).sum().backward()
        found.update(zip(batch.rows, values.detach().split(batch.lengths), strict=True))
    return found


def largest(a: Logps, b: Logps) -> float:
    """Return the largest difference of two sets of log-probs."""
    return max(float((a[row] - b[row]).detach().abs().nan_to_num(1e9).max()) for row in b if len(b[row]))


def sizes(a: Logps, *others: Logps) -> list[float]:
    """Return mean and median difference of log-probs from others, the largest of each."""
    found = [torch.cat([(a[row] - b[row]).detach().abs().nan_to_num(1e9) for row in b]) for b in others]
    return [max(float(one.mean()) for one in found), max(float(one.median()) for one in found)]


def gradients(module: Any) -> dict[str, torch.Tensor]:
    """Return an adapter's gradients under names that do not hold the adapter's."""
    return {
        name.replace(f".{POLICY}.", ".").replace(".default.", "."): p.grad.clone()
        for name, p in module.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def gradient_difference(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference of a tensor's gradient; small tensors count by the largest's hundredth.

    An expert that no token met has none in stock, and zero here.
    """
    names = ours.keys() | stock.keys()
    norms = {name: float(stock[name].norm()) if name in stock else 0.0 for name in names}
    floor = max(norms.values()) / 100
    return max(
        float((ours.get(name, torch.zeros(())) - stock.get(name, torch.zeros(()))).norm()) / max(norms[name], floor)
        for name in names
    )


def fill_adapter(base: SharedBase, seed: int = 1) -> None:
    """Give the policy's adapter values whose product is a third of each layer's weights in size."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.no_grad():
        for layer in base.adapter_layers():
            a, b = layer.masters(POLICY)
            size = float(layer.base_layer.weight.float().square().mean().sqrt())
            spread = size / 3 / (a.shape[0] ** 0.5 * layer.scaling[POLICY])
            a.copy_(
                torch.empty(a.shape, dtype=a.dtype, device="cpu").normal_(generator=generator) * a.shape[-1] ** -0.5
            )
            b.copy_(
                torch.empty(b.shape, dtype=b.dtype, device="cpu").normal_(generator=generator)
                * (spread * a.shape[-1] ** 0.5)
            )
    base.adapters_changed()


def load_stock(folder: Path, quantization: str, dtype: str) -> Any:
    """Load a folder as a user of transformers would, with eager attention."""
    from transformers import AutoModelForCausalLM

    from lowmem_rlhf.model.load import DTYPES, quantization_settings, quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            quantization_config=quantization_settings(quantization, DTYPES[dtype]),
            attn_implementation="eager",
        )
    return model.requires_grad_(False).eval()


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
    """Load a folder as a run does.

    Raises:
        Refused: the package does not take it.
    """
    try:
        return SharedBase.load(str(folder), CPU, quantization, dtype, **LORA, target_modules=targets)
    except LowmemError as error:
        raise Refused(" ".join(str(error).split())) from error


def weights_like(groups: Sequence[Group]) -> Logps:
    """Return a weight of either sign for every scored token, by row."""
    generator = torch.Generator(device="cpu").manual_seed(5)
    return {
        row: torch.empty(len(c), dtype=torch.float32, device="cpu").normal_(generator=generator)
        for row, _, c in rows_of(groups)
    }


def sampled(base: SharedBase, groups: Sequence[Group], dequantize: bool = False) -> tuple[list[Group], Logps]:
    """Sample completions of the groups' prompts in the policy; return them and their log-probs as sampled.

    Each is kept up to a token that stands for a picture or a sound, which stock forwards of such models replace.
    """
    from lowmem_rlhf.rollout.generate import Limits, generate
    from lowmem_rlhf.rollout.sampling import Sampling

    prompts = [list(group.prompt) for group in groups]
    with base.role(POLICY), base.decoding(dequantize):
        completions = generate(base, prompts, 3, 16, Sampling(1.0), Limits(4, 16, TILE), seed=3)
    found, logps = [], {}
    for prompt, of_prompt in zip(prompts, completions, strict=True):
        first = len(logps)
        kept = [next((i for i, token in enumerate(c.ids) if token >= TOKENS), len(c.ids)) for c in of_prompt]
        found.append(
            Group(
                prompt,
                [list(c.ids[:n]) for c, n in zip(of_prompt, kept, strict=True)],
                [*range(first, first + len(kept))],
            )
        )
        logps |= {
            first + i: torch.tensor(c.logps[:n], dtype=torch.float32, device="cpu")
            for i, (c, n) in enumerate(zip(of_prompt, kept, strict=True))
        }
    return found, logps


def exactness(folder: Path, scratch: Path, row: dict[str, Any]) -> None:
    """Fill a row with what fp32 shows: the layout, log-probs, gradients, sampled log-probs, stock's own noise.

    Raises:
        Refused, StockFails: see there.
    """
    groups = ragged()
    try:
        stock = load_stock(folder, "none", "float32")
        with torch.no_grad():
            untouched = stock_alone(stock, groups)
        row["stock_self"] = largest(stock_batched(stock, groups), untouched)
    except Exception as error:
        raise StockFails(told(error)) from error
    row["stage"] = "load"
    try:
        base = load_ours(folder, "none", "float32")
    except Refused as refusal:
        targets = attention_layers(stock)
        if "target_modules" not in str(refusal) or not targets:
            raise
        row["all_linear"], row["targets"] = str(refusal), targets
        base = load_ours(folder, "none", "float32", targets)
    row["way"] = "packed" if base.packable else "padded"
    row["why_padded"], row["keeps_cache"] = base.why_padded, base.packable or base.keeps_cache
    row["lean"] = base.lean is not None
    row["stage"] = "adapter"
    fill_adapter(base)
    base.save_adapter(scratch)
    try:
        from peft import PeftModel

        stock = PeftModel.from_pretrained(stock, str(scratch), is_trainable=True)
        weights = weights_like(groups)
        want = stock_alone(stock, groups)
        torch.cat([want[r] * weights[r] for r in want]).sum().backward()
        want_gradients = gradients(stock)
    except Exception as error:
        raise StockFails(f"the adapter in stock peft: {told(error)}") from error
    row["adapter_effect"] = largest(want, untouched)
    row["stage"] = "log-probs"
    with torch.no_grad(), base.role(REFERENCE):
        row["reference_logps"] = largest(ours_at_once(base, groups), untouched)
    row["policy_logps"] = row["gradients"] = 0.0
    for checkpointing, tokens in ((False, 1000), (True, 40)):
        base.set_gradient_checkpointing(checkpointing)
        for p in base.trainable().values():
            p.grad = None
        with base.role(POLICY):
            got = ours_at_once(base, groups, weights, tokens)
        row["policy_logps"] = max(row["policy_logps"], largest(got, want))
        row["gradients"] = max(row["gradients"], gradient_difference(gradients(base.peft), want_gradients))
    row["stage"] = "sampled"
    drawn, logps = sampled(base, groups)
    with torch.no_grad():
        row["sampled_logps"] = largest(logps, stock_alone(stock, drawn))
    row["stage"] = ""
    del base, stock
    gc.collect()


def rounded(folder: Path, scratch: Path, row: dict[str, Any], name: str, quantization: str, dtype: str) -> None:
    """Fill a row's column ``name`` with what a 16-bit dtype or a quantization shows, against the same weights in fp32.

    ``noise`` is how far stock in that dtype is from stock in fp32 with the same (quantized) weights, or alone from
    batched; ``logps`` and ``sampled`` is how far ours is from that fp32. Each is a mean and a median over tokens: where
    a router turns to another expert, a few tokens differ by much, in stock as here.

    Raises:
        Refused, StockFails: see there.
    """
    groups = ragged()
    try:
        truth = with_adapter(load_stock(folder, quantization, "float32"), scratch)
        stock = with_adapter(load_stock(folder, quantization, dtype), scratch)
        weights, want = weights_like(groups), stock_alone(truth, groups)
        torch.cat([want[r] * weights[r] for r in want]).sum().backward()
        want_gradients = gradients(truth)
        with torch.no_grad():
            alone = stock_alone(stock, groups)
        noise = sizes(alone, want, stock_batched(stock, groups))
    except Exception as error:
        raise StockFails(f"{name}: {told(error)}") from error
    row["stage"] = f"{name}: load"
    base = load_ours(folder, quantization, dtype, row.get("targets", "all-linear"))
    base.load_adapter(scratch)
    row["stage"] = f"{name}: log-probs"
    base.set_gradient_checkpointing(True)
    with base.role(POLICY):
        got = ours_at_once(base, groups, weights)
    found = {"noise": noise, "logps": sizes(got, want), "way": "packed" if base.packable else "padded"}
    found["cosine"] = cosine(gradients(base.peft), want_gradients)
    row["stage"] = f"{name}: sampled"
    for way, dequantize in (("sampled", False), ("sampled_dequantized", True))[: 1 + (quantization == "nf4")]:
        drawn, logps = sampled(base, groups, dequantize)
        with torch.no_grad():
            exact = stock_alone(truth, drawn)
            again = sizes(stock_alone(stock, drawn), exact)
        found[f"{way}_noise"] = [max(pair) for pair in zip(noise, again, strict=True)]
        found[way] = sizes(logps, exact)
    row["stage"], row[name] = "", found


def with_adapter(model: Any, folder: Path) -> Any:
    """Put an adapter on a stock model with stock peft; its quantized layers are told that they train.

    In evaluation bitsandbytes may repack 4-bit weights in place for a CPU, and the gradient is wrong from then on.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    for module in adapted.modules():
        if type(module).__name__ == "Linear4bit" or "Linear4bit" in str(type(module).__mro__):
            module.training = True
    return adapted


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the cosine of two gradients; a tensor that one has not is zero there."""
    pairs = [(a.get(n), b.get(n)) for n in a.keys() | b.keys()]
    dot = sum(float((x.double() * y.double()).sum()) for x, y in pairs if x is not None and y is not None)
    norms = [sum(float(t.double().square().sum()) for t in one.values()) ** 0.5 for one in (a, b)]
    return dot / (norms[0] * norms[1]) if all(norms) else 0.0


def guarded(row: dict[str, Any], run: Callable[[], None]) -> None:
    """Run a part; put into the row how it ended where it did not end well."""
    try:
        run()
    except Refused as error:
        row["verdict"], row["why"] = "refused", str(error)
    except StockFails as error:
        row["verdict"], row["why"] = "stock_fails", str(error)
    except LowmemError as error:
        row["verdict"], row["why"] = "refused", " ".join(str(error).split())
    except Exception as error:
        row["verdict"], row["why"] = "traceback", f"{row.get('stage')}: {told(error)}"
        row["traceback"] = traceback.format_exc()[-2500:]
