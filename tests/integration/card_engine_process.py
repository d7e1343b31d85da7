"""The engine's passes on the CPU and on a card: `python card_engine_process.py KIND|VCARD_FOLDER OUTPUT`.

Writes the numbers of every family and device into OUTPUT/FAMILY-DEVICE.safetensors, and OUTPUT/peaks.json. Run it in a
process of its own: the virtual card is registered for the whole process.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import torch
from cards import card_of, its_attention
from peft import PeftModel
from safetensors.torch import save_file
from tiny_architectures import save_tiny
from tiny_models import as_batch, fill_adapter, ragged_groups, tiny_model, tiny_tokenizer

from lowmem_rlhf.algorithms.grpo.math import clipped_surrogate, kl_term
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.grpo.update import Objective, backward
from lowmem_rlhf.architecture.experts import expert_stacks
from lowmem_rlhf.engine import attention
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.host_embedding import embeddings_to_host
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.logprobs import tiled_logprobs
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.rollout.sampling import Sampling

OUTPUT = Path(sys.argv[2])
CARD, DEVICE = card_of(sys.argv[1])
FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2", "lfm2", "qwen3_5", "granite_hybrid", "gemma4")
TEMPERATURE, TILE, LIMIT = 0.7, 5, 12
BUDGETS = {"whole": 1000, "split": 30, "alone": 1}
SETTINGS = GRPOSettings(beta=0.04)
LARGER = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512, "max_position_embeddings": 512}
PROMPTS, GENERATIONS, LENGTH, TOKENS = (48, 64), 8, 48, 256  # of the step whose peaks are measured
attention.EXPLICIT_ON.clear()  # the CPU takes SDPA, as a card does

Numbers = dict[str, torch.Tensor]


def base_on(device: str, family: str, **changes: Any) -> SharedBase:
    """Return the family's tiny base with the same adapter on either device."""
    model = tiny_model(family, **changes).to(device)
    base = SharedBase(model, tiny_tokenizer(), f"tiny/{family}", r=4, lora_alpha=8)
    fill_adapter(base)
    return base


def the_batch() -> Rollout:
    groups = ragged_groups(shapes=[(7, [6, 1, 9]), (3, [4, 4, 2]), (7, [1, 1, 12])])
    batch = as_batch(groups)
    advantages = [1.2, -0.7, 0.4, -0.5, 0.9, -1.1, 0.3, -0.2, 1.5]
    return Rollout(batch.prompts, batch.completions, 3, advantages=advantages)


def joined(by_row: dict[int, torch.Tensor]) -> torch.Tensor:
    return torch.cat([by_row[row].detach().cpu() for row in sorted(by_row)])


def gradient(module: torch.nn.Module) -> torch.Tensor:
    found = {name.replace(".default.", f".{POLICY}."): p for name, p in module.named_parameters() if p.requires_grad}
    flat = torch.cat([found[name].grad.cpu().flatten() for name in sorted(found)])
    module.zero_grad(set_to_none=True)
    return flat


def engine(base: SharedBase, batch: Rollout) -> Numbers:
    """Return log-probs of both roles and the gradient of the update, however it is cut."""
    numbers: Numbers = {}
    rows = range(len(batch.completions))
    for cut, tokens in BUDGETS.items():
        passes = BatchLimits(TEMPERATURE, tokens, TILE)
        for role in (POLICY, "reference"):
            with base.role(role):
                logps = completion_logprobs(base, batch.groups(rows), passes)
            numbers[f"score/{role}/{cut}"] = joined(logps)
        for checkpointing in (False, True):
            base.set_gradient_checkpointing(checkpointing)
            with base.role(POLICY):
                backward(base, batch, Objective.of(SETTINGS, LIMIT), passes, logps)
            numbers[f"update/{'recomputed' if checkpointing else 'kept'}/{cut}"] = gradient(base.peft)
    return numbers


def stock(base: SharedBase, batch: Rollout, family: str, device: str) -> Numbers:
    """Return the same from stock transformers with stock peft, each sequence alone."""
    folder = OUTPUT / f"{family}-{device}-adapter"
    base.save_adapter(folder)
    model = PeftModel.from_pretrained(tiny_model(family).to(device), folder, is_trainable=True)

    def logps_of(row: int) -> torch.Tensor:
        prompt, ids = batch.prompts[row // batch.num_generations], batch.completions[row].ids
        tokens = torch.tensor([[*prompt, *ids]], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids, device=device)[:, None]).squeeze(-1)

    rows = range(len(batch.completions))
    with model.disable_adapter(), torch.no_grad():
        reference = {row: logps_of(row) for row in rows}
    policy = {row: logps_of(row) for row in rows}
    assert SETTINGS.loss_type == "dapo"
    tokens_of_all = sum(len(c.ids) for c in batch.completions)
    total = torch.zeros((), device=device)
    for row in rows:
        own = policy[row]
        advantages = torch.full_like(own, batch.known_advantages[row], requires_grad=False)
        epsilon = SETTINGS.epsilon
        ratio = (own - own.detach()).exp()
        losses = clipped_surrogate(ratio, advantages, epsilon, epsilon)
        losses = losses + SETTINGS.beta * kl_term(ratio, own, reference[row])
        total = total + losses.sum() / tokens_of_all
    total.backward()
    return {
        "stock/policy": joined(policy),
        "stock/reference": joined(reference),
        "stock/gradient": gradient(model),
    }


def logprobs(base: SharedBase) -> Numbers:
    """Return tiled and full log-probs, entropies and gradients of the family's head."""
    generator = torch.Generator().manual_seed(3)
    width, count = base.head.module.in_features, 13  # type: ignore[union-attr]
    targets = torch.randint(0, base.head.vocabulary, (count,), generator=generator).to(base.device)
    given = torch.randn((count, int(width)), generator=generator)
    outer = torch.randn((2, count), generator=generator).to(base.device)
    numbers: Numbers = {}

    def keep(way: str, x: torch.Tensor, logps: torch.Tensor, entropies: torch.Tensor) -> None:
        (logps * outer[0] + entropies * outer[1]).sum().backward()
        found = {"logps": logps, "entropies": entropies, "gradient": x.grad}
        numbers.update({f"{way}/{name}": value.detach().cpu().clone() for name, value in found.items()})

    x = given.clone().to(base.device).requires_grad_()
    keep("tiled", x, *tiled_logprobs(x, targets, base.head, TEMPERATURE, TILE, "gradient"))
    x = given.clone().to(base.device).requires_grad_()
    logits = base.head.module(x) * base.head.scale
    if base.head.softcap:
        logits = torch.tanh(logits / base.head.softcap) * base.head.softcap
    logps = (logits / TEMPERATURE).log_softmax(-1)
    keep("full", x, logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1))
    return numbers


def sampled(base: SharedBase) -> Numbers:
    """Return completions of shared prompts, some of which end early, and their log-probs."""
    base.model.generation_config.eos_token_id = list(range(3, 97, 8))
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33]]
    numbers: Numbers = {}
    for cut, rows in {"at once": 64, "in waves": 5}.items():
        with base.role(POLICY):
            groups = wave_engine(base).generate(prompts, 4, 16, Sampling(0.9), RolloutLimits(rows, 16, 7), seed=1)
        flat = [c for group in groups for c in group]
        numbers[f"lengths/{cut}"] = torch.tensor([len(c.ids) for c in flat])
        numbers[f"tokens/{cut}"] = torch.tensor([token for c in flat for token in c.ids])
        numbers[f"sampled/{cut}"] = torch.tensor([logp for c in flat for logp in c.logps])
    return numbers


def without_embeddings(base: SharedBase, batch: Rollout) -> Numbers:
    """Return the policy's log-probs with the token embedding in host memory, and the bytes that the card has more."""
    gc.collect()
    before = CARD.live()
    embeddings_to_host(base.model)
    gc.collect()
    freed = torch.tensor([before - CARD.live()])
    with base.role(POLICY):
        logps = completion_logprobs(
            base, batch.groups(range(len(batch.completions))), BatchLimits(TEMPERATURE, 1000, TILE)
        )
    return {"offloaded": joined(logps), "offloaded/freed": freed}


def experts(device: str) -> Numbers:
    """Return log-probs of a mixture in NF4 with experts on the card and in host memory, and the bytes it takes."""
    folder = OUTPUT / "experts"
    save_tiny("qwen3_moe", folder, hidden_size=64)
    numbers: Numbers = {}
    for name, offload in {"on the card": False, "in host memory": True}.items():
        gc.collect()
        before = CARD.live()
        base = SharedBase.load(str(folder), torch.device(device), "nf4", "float32", offload_experts=offload, r=4)
        gc.collect()
        numbers[f"{name}/bytes"] = torch.tensor([CARD.live() - before])
        stacks = [getattr(module, stack) for module, stack in expert_stacks(base.model)]
        numbers[f"{name}/stacks"] = torch.tensor([s.data.numel() + 4 * s.quant_state.absmax.numel() for s in stacks])
        fill_adapter(base)
        batch = the_batch()
        with base.role(POLICY):
            logps = completion_logprobs(base, batch.groups(range(9)), BatchLimits(TEMPERATURE, 1000, TILE))
            backward(base, batch, Objective.of(SETTINGS, LIMIT), BatchLimits(TEMPERATURE, 1000, TILE), logps)
        numbers |= {f"{name}/logps": joined(logps), f"{name}/gradient": gradient(base.peft)}
        del base
    return numbers


class Peak:
    """The peak of a block over what was live before it: the card's own count, or the counter of live bytes."""

    def __init__(self, device: str, counted: bool) -> None:
        self.device, self.counter, self.bytes = device, LiveBytes() if counted else None, 0
        gc.freeze()  # as in `cards.card_of`; to look for tensors is to look at all

    def __enter__(self) -> "Peak":
        gc.collect()
        if self.counter:
            self.before = self.counter.current
            self.counter.__enter__()
        else:
            CARD.reset_peak()
            self.before = CARD.live()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.counter:
            self.counter.__exit__(*error)
        self.bytes = (self.counter.peak if self.counter else CARD.peak()) - self.before


def peaks(device: str, dtype: torch.dtype, counted: bool) -> dict[str, int]:
    """Return the peak of each phase of a step in bytes."""
    base = base_on(device, "llama", **LARGER)
    base.model.to(dtype)
    for p in base.trainable().values():
        p.data = p.data.float()
    base.dtype = dtype
    base.adapters_changed()
    base.model.generation_config.eos_token_id = None
    base.model.config.eos_token_id = None
    base.tokenizer.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 512, (n,), generator=generator).tolist() for n in PROMPTS]
    passes, found = BatchLimits(1.0, TOKENS, 64), {}
    for counting in (False, counted):  # the first time makes what stays
        with base.role(POLICY), Peak(device, counting) as peak:
            groups = wave_engine(base).generate(
                prompts, GENERATIONS, LENGTH, Sampling(), RolloutLimits(16, TOKENS, 64), seed=0
            )
        found["rollout"] = peak.bytes
        completions = [c for group in groups for c in group]
        batch = Rollout(prompts, completions, GENERATIONS, advantages=[(-1.0) ** n for n in range(len(completions))])
        with base.role("reference"), Peak(device, counting) as peak:
            reference = completion_logprobs(base, batch.groups(range(len(completions))), passes)
        found["score"] = peak.bytes
        for name, checkpointing in (("update, kept", False), ("update, recomputed", True)):
            base.set_gradient_checkpointing(checkpointing)
            base.peft.zero_grad(set_to_none=True)
            with base.role(POLICY), Peak(device, counting) as peak:
                backward(base, batch, Objective.of(SETTINGS, LENGTH), passes, reference)
            found[name] = peak.bytes
    return found


def main() -> None:
    for family in FAMILIES:
        for name, device in {"cpu": "cpu", "card": DEVICE}.items():
            base, batch = base_on(device, family), the_batch()
            with its_attention(DEVICE):
                numbers = {**engine(base, batch), **stock(base, batch, family, device)}
                numbers |= {**logprobs(base), **sampled(base)}
                if not base.model.config.tie_word_embeddings:
                    numbers |= without_embeddings(base, batch)
            save_file(numbers, OUTPUT / f"{family}-{name}.safetensors")
    with its_attention(DEVICE):
        save_file(experts(DEVICE), OUTPUT / "experts.safetensors")
        found = {
            str(dtype).removeprefix("torch."): {
                "card": peaks(DEVICE, dtype, counted=False),
                "counted on the card": peaks(DEVICE, dtype, counted=True),
                "counted on the CPU": peaks("cpu", dtype, counted=True),
            }
            for dtype in (torch.float32, torch.bfloat16)
        }
    (OUTPUT / "peaks.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
