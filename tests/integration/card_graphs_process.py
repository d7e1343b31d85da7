"""Decoding by graphs on a card: `python card_graphs_process.py KIND|VCARD_FOLDER OUTPUT`.

Writes OUTPUT/graphs.json: by family, and by way of sampling, how the captured passes of continuous batching compare
with the same passes uncaptured and with waves of shared prompts. Run it in a process of its own.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from cards import card_of, its_attention
from tiny_models import (
    EOS,
    VOCAB,
    as_batch,
    byte_tokenizer,
    fill_adapter,
    ragged_groups,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.grpo.update import Objective, backward
from lowmem_rlhf.algorithms.ppo import update as ppo
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.rollout.continuous import ContinuousEngine
from lowmem_rlhf.rollout.rollout import Completion
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.shared_prompt import SharedPromptEngine

OUTPUT = Path(sys.argv[2])
CARD, DEVICE = card_of(sys.argv[1])
KIND = torch.device(DEVICE).type
FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gemma4", "gpt2", "qwen3_5", "lfm2", "granite"),
    "granite_hybrid",
)
KEPT = ("llama", "gpt2", "gemma4", "qwen3_5", "llama, nf4")  # with which graphs outlive an optimizer step here
STOPS = list(range(EOS, VOCAB, 12))  # about a twelfth of the tokens ends a completion
PROMPTS = [[5, 6, 7, 8, 9], list(range(10, 29)), [40, 41, 42, 43], list(range(30, 41))]
EACH, LENGTH = 3, 12
SAMPLINGS = {
    "top_p": Sampling(top_p=0.8),
    "top_k": Sampling(top_k=11),
    "min_p": Sampling(min_p=0.02),
    "all": Sampling(temperature=1.3, top_p=0.9, top_k=40, min_p=0.001),
    "greedy": Sampling(temperature=0.0),
}
CONTROLS = Sampling(
    1.2, repetition_penalty=1.5, min_new_tokens=4, stop_strings=("0", "5", "A", "a", "Z", "+", "<", "m")
)
Completions = list[list[Completion]]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the card: numbers and copies that come from it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = func._schema.name.split("::")[-1]
        from_card = any(x.device.type == KIND for x in (given[1:] if name == "copy_" else given))
        to_host = (
            name in ("_to_copy", "copy_", "_copy_from") and getattr(out, "device", torch.device(KIND)).type == "cpu"
        )
        if from_card and (to_host or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")):
            self.count += 1
        return out


def compared(got: Completions, want: Completions) -> dict[str, Any]:
    """Return whether two lists of completions are the same tokens, the same bits, and how far their log-probs are."""
    pairs = [(a, b) for ours, theirs in zip(got, want, strict=True) for a, b in zip(ours, theirs, strict=True)]
    same = all(a.ids == b.ids and a.truncated == b.truncated for a, b in pairs)
    far = max((abs(x - y) for a, b in pairs for x, y in zip(a.logps, b.logps, strict=False)), default=0.0)
    return {"tokens": same, "bits": same and all(a.logps == b.logps for a, b in pairs), "logps": far}


def limits(rows: int, keep: bool = False) -> RolloutLimits:
    return RolloutLimits(rows, 64, 8, keep_graphs=keep)


def tried(base: SharedBase, sampling: Sampling, length: int = LENGTH) -> dict[str, Any]:
    """Sample with every engine; return how they compare."""
    count = len(PROMPTS) * EACH

    def sample(engine: Any, rows: int) -> Completions:
        return engine.generate(PROMPTS, EACH, length, sampling, limits(rows), seed=4)

    with base.role(POLICY), its_attention(DEVICE):
        waves = sample(SharedPromptEngine(base, False), count)
        engine, eager = ContinuousEngine(base, False), ContinuousEngine(base, False, capture=False)
        captured = sample(engine, count)
        found = {
            "note": engine.note,
            "lengths": sorted({len(c.ids) for own in waves for c in own}),
            "uncaptured": compared(captured, sample(eager, count)),
            "waves": compared(captured, waves),
        }
        with Waits() as waits:
            refilled = sample(engine, 4)
        found |= {"refilled": compared(refilled, waves), "waits": waits.count, "passes": engine.passes}
    return found


def kept(base: SharedBase) -> dict[str, Any]:
    """Sample twice with graphs that are kept, an optimizer step between; return how the second rollout compares."""
    engine = ContinuousEngine(base, False)

    def sample(engine: Any) -> Completions:
        return engine.generate(PROMPTS, EACH, LENGTH, Sampling(), limits(5, keep=True), seed=4)

    with base.role(POLICY), its_attention(DEVICE):
        before = sample(engine)
        graphs = dict(engine._graphs._graphs)
        fill_adapter(base, seed=7)
        after, fresh = sample(engine), sample(ContinuousEngine(base, False))
        same = all(engine._graphs._graphs.get(shape) is graph for shape, graph in graphs.items())
    engine.release()
    fill_adapter(base)
    return {"graphs": len(graphs), "same graphs": same, "changed": before != after, "fresh": compared(after, fresh)}


def broken(base: SharedBase) -> dict[str, Any]:
    """Sample where a replay does nothing; return what is said and how the completions compare."""
    graph = torch.get_device_module(DEVICE).CUDAGraph
    replay, engine = graph.replay, ContinuousEngine(base, False)
    with base.role(POLICY), its_attention(DEVICE):
        waves = SharedPromptEngine(base, False).generate(PROMPTS, EACH, LENGTH, Sampling(), limits(12), seed=4)
        graph.replay = lambda self: None
        try:
            found = engine.generate(PROMPTS, EACH, LENGTH, Sampling(), limits(5), seed=4)
        finally:
            graph.replay = replay
    return {"note": engine.note, "waves": compared(found, waves)}


def waits_by_micro_batches() -> dict[str, list[int]]:
    """Return how often the host waits in passes over a batch, in one micro-batch and in several."""
    base = base_of("llama")
    batch = as_batch(ragged_groups(shapes=[(7, [6, 1, 9]), (3, [4, 4, 2]), (7, [1, 1, 12])]))
    rows = range(len(batch.completions))
    found: dict[str, list[int]] = {"score": [], "update": [], "mini-batch": []}
    for tokens in (1000, 30):
        passes = BatchLimits(1.0, tokens, 8)
        with base.role(POLICY):
            with Waits() as waits:
                logps = completion_logprobs(base, batch.groups(rows), passes)
            found["score"].append(waits.count)
            with Waits() as waits:
                backward(base, batch, Objective.of(GRPOSettings(beta=0.04), 12), passes, logps, logps)
            found["update"].append(waits.count)
            targets = ppo.Targets(logps, {row: torch.ones_like(own) for row, own in logps.items()})
            with Waits() as waits:
                ppo.backward(base, batch, list(rows), targets, PPOSettings(), passes).stats.metrics()
            found["mini-batch"].append(waits.count)
    return found


def base_of(family: str) -> SharedBase:
    base = SharedBase(tiny_model(family).to(DEVICE), tiny_tokenizer(STOPS), f"tiny/{family}", r=4, lora_alpha=8)
    fill_adapter(base)
    return base


def quantized(family: str) -> SharedBase:
    folder = save_tiny(family, OUTPUT / family)
    base = SharedBase.load(str(folder), torch.device(DEVICE), "nf4", "float32", r=4, lora_alpha=8)
    base.tokenizer = tiny_tokenizer(list(range(3, 260, 12)))
    fill_adapter(base)
    return base


def main() -> None:
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], SharedBase]] = {family: lambda f=family: base_of(f) for family in FAMILIES}
    makers |= {f"{family}, nf4": lambda f=family: quantized(f) for family in ("llama", "gemma3", "qwen3_5")}
    results: dict[str, Any] = {}
    for name, make in makers.items():
        base = make()
        results[name] = tried(base, Sampling()) | ({"kept": kept(base)} if name in KEPT else {})
        results[name] |= {"fast": base.fast_decoder is not None}
    base = base_of("llama")
    for name, sampling in SAMPLINGS.items():
        results[f"sampling: {name}"] = tried(base, sampling)
    base = base_of("qwen2")
    base._missing = (base.tokenizer, torch.arange(VOCAB, device=DEVICE) % 3 == 1)  # ids that belong to no token
    results["missing ids"] = tried(base, Sampling(top_p=0.9))
    results["missing ids, controls"] = tried(base, replace(CONTROLS, stop_strings=()))
    base = base_of("llama")
    base.tokenizer = byte_tokenizer()
    results["controls"] = tried(base, CONTROLS)
    base = base_of("llama")
    base.tokenizer = tiny_tokenizer([EOS])
    results["growing room"] = tried(base, Sampling(), length=90)
    results["broken"] = broken(base_of("llama"))
    results["micro-batches"] = waits_by_micro_batches()
    (OUTPUT / "graphs.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
