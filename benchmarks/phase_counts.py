"""Hold the plan's kernels, FLOPs and bytes of our engine's phases against what a card is given to do.

    python benchmarks/phase_counts.py [--card FOLDER] [--every K] [--json]

Twelve cases: models of unlike shapes, weights in NF4 and 16 bits, kept and recomputed layers, prompts and completions
of unlike numbers and lengths. For each a scoring pass, an update and the decoding of a token run on the virtual card
(the folder of ``vcard.py``). Every operation that starts a kernel is counted as one, an attention call and its gradient
as well, with the FLOPs of products and the bytes of what it reads and writes; what a table is looked up for counts as
the rows that are read. Predicted over counted, less one.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launches import card
from work import ROOT

WORKS = ("score", "update", "decode")
MEASURES = ("kernels", "flops", "bytes")
RANK, TILE, VOCABULARY = 8, 16, 5000


@dataclass(frozen=True)
class Case:
    """A model and a step.

    Attributes:
        family, sizes: of the model; hidden size, inner size, heads, key heads and layers.
        quantization: of its weights.
        checkpointing: layers that are recomputed.
        prompts: lengths of the prompts.
        generations: completions of each.
        length: of a completion.
    """

    family: str
    sizes: tuple[int, int, int, int, int]
    quantization: str
    checkpointing: int
    prompts: tuple[int, ...]
    generations: int
    length: int


CASES = (
    Case("llama", (256, 512, 8, 8, 3), "nf4", 0, (24,), 4, 20),
    Case("llama", (256, 512, 8, 2, 3), "nf4", 3, (24,), 4, 20),
    Case("llama", (256, 768, 4, 2, 4), "none", 0, (36,), 8, 12),
    Case("llama", (128, 512, 4, 4, 6), "none", 6, (15, 17), 4, 30),
    Case("llama", (384, 768, 6, 3, 2), "nf4", 1, (47, 49), 2, 60),
    Case("qwen2", (256, 512, 4, 2, 3), "nf4", 0, (32,), 8, 24),
    Case("qwen2", (256, 1024, 8, 4, 2), "none", 2, (30, 34), 4, 40),
    Case("qwen3", (256, 512, 4, 2, 3), "nf4", 3, (64,), 4, 16),
    Case("qwen3", (192, 512, 6, 2, 4), "none", 0, (20,), 6, 50),
    Case("mistral", (256, 640, 8, 4, 3), "nf4", 0, (31, 33), 6, 20),
    Case("mistral", (256, 512, 4, 1, 3), "none", 3, (80,), 2, 40),
    Case("llama", (512, 1024, 8, 4, 2), "nf4", 2, (128,), 8, 32),
)


class Counter:
    """What torch is asked for on the card, seen at the level of its operators."""

    def __init__(self) -> None:
        self.kernels, self.flops, self.bytes, self.inside = 0, 0.0, 0.0, 0

    def kernel(self, flops: float, count: float) -> None:
        self.kernels += 1
        self.flops += flops
        self.bytes += count

    def seen(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operator unless it is a view, makes an empty tensor, or stands within an attention call."""
        import torch
        from torch.utils._pytree import tree_leaves

        def tensors(*values: Any) -> list[torch.Tensor]:
            return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor) and one.device.type != "cpu"]

        given, made, name = tensors(args, kwargs), tensors(out), func._schema.name.split("::")[-1]
        storages = {one.untyped_storage().data_ptr() for one in given}
        fresh = [one for one in made if one.untyped_storage().data_ptr() not in storages]
        changes = func._schema.is_mutable
        if self.inside or not (fresh or changes) or not (given or fresh) or name.startswith(("empty", "new_empty")):
            return
        written = _bytes(fresh) if fresh else _bytes(made[:1])
        self.kernel(_flops(name, given, made), _read(name, func._overloadname, given, made, kwargs) + written)


def _bytes(tensors: Sequence[Any]) -> float:
    return sum(one.numel() * one.element_size() for one in tensors)


def _flops(name: str, given: Sequence[Any], made: Sequence[Any]) -> float:
    if name == "gemm_4bit":
        return 2.0 * made[0].numel() * given[0].shape[-1]
    if name in ("mm", "bmm"):
        return 2.0 * made[0].numel() * given[0].shape[-1]
    return 2.0 * made[0].numel() * given[1].shape[-1] if name in ("addmm", "addmm_") else 0.0


LOOKED_UP = ("embedding", "index_select", "gather", "index")
FILLED = ("zeros_like", "ones_like", "full_like", "zero_", "fill_", "new_zeros")


def _read(name: str, overload: str, given: Sequence[Any], made: Sequence[Any], kwargs: Any) -> float:
    if name in FILLED:
        return 0.0
    if name in LOOKED_UP:
        return _bytes(made) + _bytes(given[1:])
    if name == "index_copy_":  # the rows that are written, not all of them
        return _bytes(given[1:]) + _bytes(given[2:]) - _bytes(made[:1])
    if name == "copy_":
        given = given[1:]
    elif overload == "out":
        given = given[:-1]
    if name == "addmm" and kwargs.get("beta") == 0:
        given = given[1:]
    dense = 0.0
    if name == "gemm_4bit" and given[0].numel() // given[0].shape[-1] > 64:  # made dense, then multiplied
        dense = 2.0 * 2 * given[1].numel() * given[0].element_size()
    return _bytes(given) + dense


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what the block does; an attention call and its gradient are one operator each, as on CUDA."""
    import torch
    import torch.nn.functional as F
    from torch.utils._python_dispatch import TorchDispatchMode

    counter, real = Counter(), F.scaled_dot_product_attention

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            counter.seen(func, args, kwargs or {}, out)
            return out

    def call(q: Any, k: Any, v: Any, given: dict[str, Any]) -> Any:
        counter.inside += 1
        try:
            return real(q, k, v, **given)
        finally:
            counter.inside -= 1

    def attention(q: Any, k: Any, v: Any, given: dict[str, Any], back: float, moved: float) -> None:
        pairs = q[..., 0].numel() * k.shape[-2] * (0.5 if given.get("is_causal") else 1.0)
        counter.kernel(back * 4 * pairs * q.shape[-1], moved)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, given: dict[str, Any]) -> Any:
            ctx.save_for_backward(q, k, v)
            ctx.given = given
            out = call(q, k, v, given)
            attention(q, k, v, given, 1.0, _bytes([q, k, v, out]))
            return out

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            inputs = ctx.saved_tensors
            counter.inside += 1
            with torch.enable_grad():
                again = [one.detach().requires_grad_() for one in inputs]
                found = torch.autograd.grad(real(*again, **ctx.given), again, grad)
            counter.inside -= 1
            attention(*inputs, ctx.given, 2.5, 2 * _bytes(inputs) + 2 * _bytes([grad]))
            return *found, None

    F.scaled_dot_product_attention = lambda q, k, v, **given: Attention.apply(q, k, v, given)  # type: ignore[assignment]
    try:
        with Mode():
            yield counter
    finally:
        F.scaled_dot_product_attention = real


def save(case: Case, folder: Path) -> None:
    """Write a random model of the case's sizes with a tokenizer of bytes."""
    import torch
    from model_folders import byte_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, inner, heads, keys, layers = case.sizes
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    # a token for each logit; where some belong to none, drawing past them takes three kernels more
    tokenizer.add_tokens([f"<{number}>" for number in range(VOCABULARY - len(tokenizer))])
    config = AutoConfig.for_model(
        case.family,
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        num_hidden_layers=layers,
        head_dim=hidden // heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def counted(case: Case, folder: Path, device: str) -> dict[str, Counter]:
    """Return what a scoring pass, an update and a decoded token of the case do."""
    import torch

    from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
    from lowmem_rlhf.algorithms.grpo.update import Objective, backward
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.engine.ladder import RolloutLimits
    from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
    from lowmem_rlhf.engine.roles import POLICY
    from lowmem_rlhf.rollout.continuous import ContinuousEngine
    from lowmem_rlhf.rollout.rollout import Completion, Rollout
    from lowmem_rlhf.rollout.sampling import Sampling

    base = SharedBase.load(
        str(folder), torch.device(device), case.quantization, "float16", join=True, r=RANK, lora_alpha=2 * RANK
    )
    base.set_gradient_checkpointing(case.checkpointing)
    limits, length = BatchLimits(1.0, 100_000, TILE), case.length
    rows = len(case.prompts) * case.generations
    prompts = [[5 + place % 200 for place in range(size)] for size in case.prompts]
    completions = [
        Completion([7 + (row + n) % 200 for n in range(length)], [-1.0] * length, False) for row in range(rows)
    ]
    batch = Rollout(prompts, completions, case.generations, advantages=[(-1.0) ** row for row in range(rows)])
    found: dict[str, Counter] = {}
    with base.role(POLICY):
        logps = completion_logprobs(base, batch.groups(range(rows)), limits)
        works: dict[str, Callable[[], Any]] = {
            "score": lambda: completion_logprobs(base, batch.groups(range(rows)), limits),
            "update": lambda: backward(base, batch, Objective.of(GRPOSettings(beta=0.0), length), limits, logps),
        }
        for name, work in works.items():
            work()
            with counting() as found[name]:
                work()

        def decode(tokens: int) -> Counter:
            engine, most = ContinuousEngine(base, capture=False), RolloutLimits(rows, 100_000, TILE)
            with counting() as counter:
                engine.generate(prompts, case.generations, tokens, Sampling(), most, seed=0)
            return counter

        with base.decoding(False):
            decode(9)
            few, many = decode(9), decode(17)
    token = found["decode"] = Counter()
    for name in MEASURES:
        setattr(token, name, (getattr(many, name) - getattr(few, name)) / 8)
    return found


def predicted(case: Case, folder: Path) -> dict[str, Any]:
    """Return what the plan thinks that these do."""
    from lowmem_rlhf.architecture.dimensions import from_config_file
    from lowmem_rlhf.hardware.device import Device
    from lowmem_rlhf.hardware.speed import Speed
    from lowmem_rlhf.planning.limits import LOOK, seen_room, slot_room
    from lowmem_rlhf.planning.memory.resident import Memory, Settings
    from lowmem_rlhf.planning.shapes import packed_shape
    from lowmem_rlhf.planning.time.passes import Passes
    from lowmem_rlhf.planning.time.rates import rates
    from lowmem_rlhf.recipe.loading import load_recipe

    settings = Settings(
        quantization=case.quantization,
        compute_dtype="float16",
        gradient_checkpointing=case.checkpointing,
        offload_checkpoints=False,
        micro_batch_tokens=100_000,
        score_batch_tokens=100_000,
        rollout_batch_size=len(case.prompts) * case.generations,
        rollout_weights="joined" if case.quantization == "nf4" else "quantized",
        logits_tile_tokens=TILE,
        optim="adamw",
        lora={"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"},
    )
    card = Device("cuda:0", "card", 2**40, 2**40, (7, 5), bf16=False, source="profile")
    dims = from_config_file(folder / "config.json", case.family)
    recipe = load_recipe("grpo_gsm8k", ["generation.temperature=1.0"])
    passes = Passes(Memory(dims, recipe, settings, card), rates(Speed(100, 20, 500)))
    prompt, groups = round(statistics.mean(case.prompts)), len(case.prompts)
    shape = packed_shape(prompt, case.length - 1, case.length, case.generations, groups, 100_000)
    seen = seen_room(prompt + 17 + LOOK, slot_room(max(case.prompts), 17))
    return {
        "score": passes.score(shape, 1),
        "update": passes.update(shape, 1),
        "decode": passes.token(groups * case.generations, seen),
    }


def compare(cases: Sequence[Case], device: str) -> list[dict[str, Any]]:
    """Return each case with counted, predicted and error by work and measure."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as scratch:
            save(case, Path(scratch))
            have, think = counted(case, Path(scratch), device), predicted(case, Path(scratch))
        row: dict[str, Any] = {"case": case.__dict__}
        for work in WORKS:
            pairs = {one: (getattr(have[work], one), getattr(think[work], one)) for one in MEASURES}
            row[work] = {
                one: {"counted": real, "predicted": guess, "error": guess / real - 1}
                for one, (real, guess) in pairs.items()
            }
        rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return by work and measure the mean size of the errors, and the largest."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for work in WORKS:
        errors = {one: [abs(row[work][one]["error"]) for row in rows] for one in MEASURES}
        found[work] = {one: {"mean": statistics.mean(sizes), "worst": max(sizes)} for one, sizes in errors.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--card", default=str(ROOT.parent / "shared" / "vcard"), help="folder of vcard.py")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only each K-th case")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.every < 1:
        raise SystemExit(f"--every: got {given.every}; 1 takes all cases")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    device, _ = card(given.card)
    from lowmem_rlhf.quiet import hush

    hush()
    rows = compare(CASES[:: given.every], device)
    found = summary(rows)
    if given.json:
        print(json.dumps({"rows": rows, "total": found}, indent=2))
        return
    for row in rows:
        case = row["case"]
        cells = (f"{work} " + " ".join(f"{100 * row[work][one]['error']:+5.1f}" for one in MEASURES) for work in WORKS)
        print(f"{case['family']:8}{case['quantization']:6}{case['checkpointing']:3}  " + "   ".join(cells))
    for work in WORKS:
        cells = (
            f"{one} {100 * found[work][one]['mean']:.1f} (worst {100 * found[work][one]['worst']:.1f})"
            for one in MEASURES
        )
        print(f"{work:8} % off: " + ", ".join(cells))


if __name__ == "__main__":
    main()
