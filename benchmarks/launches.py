"""Count the kernels that a card starts for a decoded token, a scoring pass and an update, ours and the stock stack's.

    python benchmarks/launches.py [--card FOLDER] [--rows R] [--json]

A GPU that computes small products waits for the starts of kernels, so their number is what a token costs. It is counted
on the virtual card (the folder of ``vcard.py``), or on a CUDA card with ``--card cuda``: every operation that starts a
kernel, an attention call and a quantized product as one. The model is of Llama's shape, tiny, with NF4 weights and one
adapter. Two models of different depth tell the kernels of a layer from those outside: a layer's is the difference over
the layers that one has more. Decoding is one token of all rows, with sampling; scoring and update are one micro-batch.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from work import ROOT

LAYERS = (2, 4)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = (9, 25)  # decoded in two runs, whose difference is that of so many tokens
PROMPT = list(range(5, 25))
SIDES = ("ours", "stock")

Counts = dict[str, dict[str, int]]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--card", default=str(ROOT.parent / "shared" / "vcard"), help="folder of vcard.py, or cuda")
    parser.add_argument("--rows", type=int, default=4, help="completions that are decoded at once")
    parser.add_argument("--json", action="store_true")
    return parser


def card(given: str) -> tuple[str, Callable[[], AbstractContextManager[Any]]]:
    """Return the device and what counts kernels on it.

    Raises:
        SystemExit: the virtual card is not there.
    """
    if given == "cuda":
        return "cuda:0", CudaLaunches
    if not (Path(given) / "vcard.py").is_file():
        raise SystemExit(f"--card: {given} holds no vcard.py; give its folder, or cuda for a real card")
    sys.path.insert(0, str(ROOT / "tests"))
    from cards import card_of

    found, device = card_of(given)
    return device, found.launches


class CudaLaunches:
    """What torch's profiler saw of kernels, as ``kernels`` after the block."""

    kernels = 0

    def __enter__(self) -> "CudaLaunches":
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        import torch

        torch.cuda.synchronize()
        self._profile.__exit__(*error)
        events = self._profile.events() or ()
        self.kernels = sum(one.device_type.name == "CUDA" and "Memcpy" not in one.name for one in events)


def save_model(folder: Path, layers: int) -> Path:
    """Write a random model of Llama's shape with a tokenizer of bytes."""
    import torch
    from model_folders import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None  # nothing ends early
    # a logit for each token, as Llama has; where some belong to none, drawing past them takes three kernels more
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=layers, max_position_embeddings=256, eos_token_id=None, **SIZES
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ours(folder: Path, device: str, count: Callable[[], Any], rows: int) -> dict[str, int]:
    """Return our kernels for a decoded token, a scoring pass and an update."""
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

    base = SharedBase.load(str(folder), torch.device(device), "nf4", "float16", join=True, r=8, lora_alpha=16)
    limits, passes = RolloutLimits(rows, 512, 64), BatchLimits(1.0, 4096, 64)
    completions = [Completion(list(range(30 + row, 40 + row)), [-1.0] * 10, False) for row in range(rows)]
    batch = Rollout([PROMPT], completions, rows, advantages=[(-1.0) ** row for row in range(rows)])

    def decode(length: int) -> None:
        ContinuousEngine(base, capture=False).generate([PROMPT], rows, length, Sampling(), limits, seed=0)

    with base.role(POLICY):
        logps = completion_logprobs(base, batch.groups(range(rows)), passes)
        works = {
            "score": lambda: completion_logprobs(base, batch.groups(range(rows)), passes),
            "update": lambda: backward(base, batch, Objective.of(GRPOSettings(beta=0.0), 10), passes, logps),
        }
        found = counted(works, count)
        with base.decoding(False):
            return {"decode": per_token(decode, count), **found}


def stock(folder: Path, device: str, count: Callable[[], Any], rows: int) -> dict[str, int]:
    """Return the same of stock transformers with stock peft: generate, a forward and a backward pass of padded rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, quantization_config=settings, device_map={"": device}
    )
    model = get_peft_model(loaded, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    prompt = torch.tensor([PROMPT] * rows, dtype=torch.long, device=device)
    answers = [list(range(30 + row, 40 + row)) for row in range(rows)]
    whole = torch.tensor([PROMPT + answer for answer in answers], dtype=torch.long, device=device)
    targets = whole[:, len(PROMPT) :, None]

    def decode(length: int) -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )

    def logps() -> Any:
        logits = model(input_ids=whole, use_cache=False).logits[:, len(PROMPT) - 1 : -1].float()
        return logits.log_softmax(-1).gather(-1, targets)

    @torch.no_grad()
    def score() -> None:
        logps()

    def update() -> None:
        logps().sum().backward()
        model.zero_grad(set_to_none=True)

    with torch.no_grad():
        decoded = per_token(decode, count)
    return {"decode": decoded, **counted({"score": score, "update": update}, count)}


def per_token(decode: Callable[[int], None], count: Callable[[], Any]) -> int:
    """Return the kernels of one decoded token, from runs of two lengths."""
    kernels = []
    for length in TOKENS:
        decode(length)  # what is made once
        with count() as counter:
            decode(length)
        kernels.append(counter.kernels)
    return round((kernels[1] - kernels[0]) / (TOKENS[1] - TOKENS[0]))


def counted(works: dict[str, Callable[[], Any]], count: Callable[[], Any]) -> dict[str, int]:
    """Return the kernels of each piece of work, at its second time."""
    found = {}
    for name, work in works.items():
        work()
        with count() as counter:
            work()
        found[name] = counter.kernels
    return found


def split(few: dict[str, int], many: dict[str, int]) -> Counts:
    """Return the kernels of a layer and those outside, by work, from models of `LAYERS` layers."""
    result = {}
    for name in few:
        layer = round((many[name] - few[name]) / (LAYERS[1] - LAYERS[0]))
        result[name] = {"per_layer": layer, "outside": few[name] - LAYERS[0] * layer}
    return result


def measure(device: str, count: Callable[[], Any], rows: int) -> dict[str, Counts]:
    """Return by work (decode, score, update) and by side the kernels of a layer and those outside."""
    by_side: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [save_model(Path(scratch) / str(layers), layers) for layers in LAYERS]
        for side, run in zip(SIDES, (ours, stock), strict=True):
            by_side[side] = split(*(run(folder, device, count, rows) for folder in folders))
    return {work: {side: by_side[side][work] for side in SIDES} for work in by_side["ours"]}


def main(arguments: Sequence[str] | None = None) -> None:
    given = options().parse_args(arguments)
    if given.rows < 1:
        raise SystemExit(f"--rows: got {given.rows}; at least one has to be decoded")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile what the virtual card has no kernel of
    device, count = card(given.card)
    from lowmem_rlhf.quiet import hush

    hush()
    found = measure(device, count, given.rows)
    if given.json:
        print(json.dumps({"device": device, "rows": given.rows, **found}, indent=2))
        return
    print(f"{'kernels':<12}" + "".join(f"{side + ', a layer':>18}{side + ', outside':>18}" for side in SIDES))
    for work, sides in found.items():
        cells = (f"{sides[side]['per_layer']:>18}{sides[side]['outside']:>18}" for side in SIDES)
        print(f"{work:<12}" + "".join(cells))


if __name__ == "__main__":
    main()
