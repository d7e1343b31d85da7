"""Log-probs and gradients of a tiny model, by stock transformers and by this package's training pass and rollout."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_architectures import EOS, TOKENS

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import POLICY

CPU = torch.device("cpu")
SHAPES = ((13, (9, 1, 14)), (6, (5, 11, 2)))  # prompt and completions, in tokens
TILE = 7

Logps = dict[int, torch.Tensor]


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
    from lowmem_rlhf.engine.passes import micro_batches, packed_logprobs

    found: Logps = {}
    for batch in micro_batches(base, groups, tokens):
        values, _ = packed_logprobs(base, batch, 1.0, TILE)
        if weights is not None:
            (values * torch.cat([weights[row] for row in batch.rows])).sum().backward()
        found.update(zip(batch.rows, values.detach().split(batch.lengths), strict=True))
    return found


def with_gradients(
    model: Any, run: Callable[[Any, Sequence[Group]], Logps], groups: Sequence[Group], weights: Logps
) -> tuple[Logps, dict[str, torch.Tensor]]:
    """Return log-probs by row of a stock pass, and the adapter's gradients of their weighted sum."""
    model.zero_grad()
    logps = run(model, groups)
    torch.cat([logps[row] * weights[row] for row in logps]).sum().backward()
    return {row: values.detach() for row, values in logps.items()}, gradients(model)


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
    """Load a folder as a user of transformers does; of a model for images or sound, its text-only class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem_rlhf.engine.experts import split_experts
    from lowmem_rlhf.engine.load import DTYPES, quantization_settings, quiet, text_only

    with quiet():
        config, tower = text_only(AutoConfig.from_pretrained(folder))
        tower.pop("may_hold", None)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            **tower,
            dtype=DTYPES[dtype],
            quantization_config=quantization_settings(quantization, DTYPES[dtype]),
        )
    split_experts(model)  # stock has no experts in NF4
    return model.requires_grad_(False).eval()


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
    from lowmem_rlhf.engine.ladder import RolloutLimits
    from lowmem_rlhf.rollout.engine import wave_engine
    from lowmem_rlhf.rollout.sampling import Sampling

    prompts = [list(group.prompt) for group in groups]
    with base.role(POLICY), base.decoding(dequantize):
        completions = wave_engine(base).generate(prompts, 3, 16, Sampling(1.0), RolloutLimits(4, 16, TILE), seed=3)
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


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the cosine of two gradients; a tensor that one has not is zero there."""
    pairs = [(a.get(n), b.get(n)) for n in a.keys() | b.keys()]
    dot = sum(float((x.double() * y.double()).sum()) for x, y in pairs if x is not None and y is not None)
    norms = [sum(float(t.double().square().sum()) for t in one.values()) ** 0.5 for one in (a, b)]
    return dot / (norms[0] * norms[1]) if all(norms) else 0.0
