"""Runs on a card, in a process of their own: `python card_process.py KIND|VCARD_FOLDER MODEL OUTPUT`.

Writes one run directory a case into OUTPUT, and OUTPUT/facts.json with what only this process could see.
"""

import contextlib
import gc
import io
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import torch
from cards import card_of, its_attention
from tiny_classifiers import save_classifier
from tiny_runs import tiny_recipe, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem_rlhf import cli
from lowmem_rlhf.algorithms.grpo import trainer as grpo
from lowmem_rlhf.engine import attention
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import Group, pack
from lowmem_rlhf.engine.passes import packed_logprobs
from lowmem_rlhf.hardware.capabilities import CAPABILITIES, capabilities
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.rollout.graphs import StepGraphs
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.online import Trainer
from lowmem_rlhf.training.optimizer import Optimizer

CARD, DEVICE = card_of(sys.argv[1])
MODEL, OUTPUT = Path(sys.argv[2]), Path(sys.argv[3])
SIDES = {"cpu": "cpu", "card": DEVICE}
PRECISIONS = {
    "float32": {"quantization": "none", "compute_dtype": "float32"},
    "bfloat16": {"quantization": "none", "compute_dtype": "bfloat16"},
    "float16": {"quantization": "none", "compute_dtype": "float16"},
    "nf4": {"quantization": "nf4", "compute_dtype": "bfloat16"},
}
if not DEVICE.startswith("vcard"):  # the virtual card has none of its kernels
    PRECISIONS["int8"] = {"quantization": "int8", "compute_dtype": "float16"}
attention.EXPLICIT_ON.clear()  # the CPU's runs take SDPA, as a card does
facts: dict[str, Any] = {}


def recipe(device: str, precision: str = "float32", steps: int = 2, **hardware: Any) -> Any:
    settings = {"device": device, **PRECISIONS[precision], **hardware}
    return tiny_recipe(MODEL, hardware=settings, training={"max_steps": steps})


def run_and_resume(side: str, precision: str) -> None:
    """Two steps, a checkpoint, and a third step by a resumed run."""
    folder = OUTPUT / f"{precision}-{side}"
    with its_attention(DEVICE):
        train(recipe(SIDES[side], precision), folder)
        train(recipe(SIDES[side], precision, steps=3), folder, resume=True)


@contextlib.contextmanager
def graphs_known() -> Any:
    """Let the package know that this kind of card has graphs, which it then takes by itself."""
    kind = torch.device(DEVICE).type
    known = CAPABILITIES.get(kind)
    CAPABILITIES[kind] = replace(capabilities(DEVICE), graphs=True)
    try:
        yield
    finally:
        CAPABILITIES.pop(kind)
        if known is not None:
            CAPABILITIES[kind] = known


def by_graphs(precision: str, **hardware: Any) -> dict[str, Any]:
    """Three steps whose tokens are decoded by graphs that are kept; return what was said and which were captured."""
    captured: list[Any] = []
    said = io.StringIO()

    def note(call: int, graphs: Any, one: Any) -> None:
        captured.append(one.shape)

    with graphs_known(), its_attention(DEVICE), noted(StepGraphs, "_captured", note), contextlib.redirect_stdout(said):
        train(recipe(DEVICE, precision, steps=3, **hardware), OUTPUT / f"graphs-{precision}")
    return {"captured": captured, "said": said.getvalue()}


def placement() -> dict[str, Any]:
    base = SharedBase.load(str(MODEL), torch.device(DEVICE), "nf4", "bfloat16")
    tensors = [*base.parameters(), *base.buffers()]
    try:
        torch.ones(2, device=DEVICE) + torch.ones(2, device="cpu")
        mixing = "no error"
    except RuntimeError as error:
        mixing = str(error)
    return {"devices": sorted({str(t.device) for t in tensors}), "mixing": mixing}


def learned_reward(policy: str, device: str, name: str) -> None:
    """Two steps with a classifier as the reward, on a device of its own."""
    if not (folder := OUTPUT / "classifier").exists():
        save_classifier(folder)
    options = {"model": str(folder), "label": 1, "batch_tokens": 64, "device": device}
    values = {**recipe(policy).model_dump(), "evaluation": {}}
    values["rewards"] = [{"function": "classifier", "options": options}]
    with its_attention(DEVICE):
        train(validate_recipe(values), OUTPUT / name)


def stages() -> tuple[Path, Path]:
    """Return the runs that PPO goes on from, a fine-tuning's and a reward model's; both are made on the CPU."""
    sft, judge = OUTPUT / "sft", OUTPUT / "judge"
    if not sft.exists():
        given: dict[str, Any] = {"training": {"max_steps": 2}, "hardware": {"device": "cpu"}, "rewards": []}
        train(tiny_recipe(MODEL, algorithm="sft", data={"eval_size": 0}, sft={"max_length": 32}, **given), sft)
        pairs = [{"prompt": f"{a}+2=", "chosen": "12", "rejected": "abc"} for a in range(8)]
        data = {"train": str(write_jsonl(OUTPUT / "pairs.jsonl", pairs)), "template": None, "prompt": "prompt"}
        given |= {"data": {**data, "train_size": None, "eval_size": 0}, "reward_model": {"max_length": 32}}
        train(tiny_recipe(MODEL, algorithm="reward_model", **given), judge)
    return sft, judge


def all_roles(side: str, precision: str) -> None:
    """Two steps of PPO with start, policy, critic and reward on one base."""
    sft, judge = stages()
    with its_attention(DEVICE):
        train(
            tiny_recipe(
                MODEL,
                algorithm="ppo",
                adapter=str(sft),
                hardware={"device": SIDES[side], **PRECISIONS[precision]},
                data={"eval_size": 0},
                training={"max_steps": 2},
                rewards=[{"function": "reward_adapter", "options": {"adapter": str(judge)}}],
                ppo={"num_ppo_epochs": 2, "num_mini_batches": 2, "bootstrap_truncated": True, "entropy_coef": 0.01},
            ),
            OUTPUT / f"ppo-{precision}-{side}",
        )


@contextlib.contextmanager
def noted(owner: Any, name: str, act: Callable[..., None]) -> Any:
    """Call ``act(call, *arguments)`` before each call of a function, calls counted from 1."""
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        act(len(calls), *args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def before(owner: Any, name: str, act: Callable[[int], None]) -> Any:
    """Call ``act(call)`` before each call of a function; the card is whole again behind it."""
    try:
        with noted(owner, name, lambda call, *args: act(call)):
            yield
    finally:
        CARD.fail_at(-1)
        CARD.set_capacity(2**40)


def out_of_memory(name: str, owner: Any, function: str, act: Callable[[int], None], **hardware: Any) -> dict[str, Any]:
    """Run the recipe from the command line while memory runs out; return exit code and output."""
    file = OUTPUT / f"{name}.yaml"
    file.write_text(recipe(DEVICE, **hardware).to_yaml())
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["lowmem-rlhf", "train", str(file), "--output", str(OUTPUT / name)]
    with before(owner, function, act), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def offloaded(dtype: torch.dtype) -> dict[str, Any]:
    """Passes of a deeper model with checkpoints on the card and in host memory, undisturbed and out of memory."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlamaConfig(num_hidden_layers=6, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False).to(DEVICE, dtype)
    base = SharedBase(model, SimpleNamespace(eos_token_id=1), "deeper", r=4)
    with torch.no_grad():
        for p in base.trainable().values():
            p.add_(0.02)
    base.adapters_changed()
    row = pack([Group([5] * 40, [[7 + n] * 64 for n in range(3)], [0, 1, 2])], base.device)

    def one_pass(layers: int, offload: bool) -> dict[str, Any]:
        base.set_gradient_checkpointing(layers, offload)
        for p in base.trainable().values():  # there from the start, as in training
            p.grad = torch.zeros_like(p)
        gc.collect()
        start, calls = CARD.live(), CARD.allocs()
        CARD.reset_peak()
        with base.role("policy"):
            packed_logprobs(base, row, 1.0, 16)[0].sum().backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in base.trainable().values()])  # type: ignore[union-attr]
        return {"gradients": gradients, "peak": CARD.peak() - start, "allocs": CARD.allocs() - calls}

    one_pass(0, False)  # makes the adapters' copies
    kept, here, there, half = (one_pass(*how) for how in ((0, False), (6, False), (6, True), (3, True)))
    failed, before = 0, CARD.live()
    for part in (1, 3, 5, 6, 7):
        CARD.fail_at(CARD.allocs() + there["allocs"] * part // 8)
        try:
            one_pass(6, True)
        except torch.OutOfMemoryError:
            failed += 1
    until = time.monotonic() + 20
    while CARD.live() > before and time.monotonic() < until:  # the backward pass's own thread lets go a moment later
        gc.collect()
        time.sleep(0.01)
    left, again = CARD.live() - before, one_pass(6, True)
    return {
        "checkpoint_bytes": row.input_ids.numel() * config.hidden_size * dtype.itemsize,
        "peaks": {"kept": kept["peak"], "here": here["peak"], "there": there["peak"], "again": again["peak"]},
        "norm": float(kept["gradients"].norm()),
        "apart": [float((kept["gradients"] - one["gradients"]).norm()) for one in (here, there, half, again)],
        "failed": failed,
        "left": left,
    }


def fail_once(after: int) -> Callable[[int], None]:
    return lambda call: CARD.fail_at(CARD.allocs() + after) if call == 1 else None


def by_graphs_out_of_memory(name: str, owner: Any, function: str, call: int) -> dict[str, Any]:
    """As `out_of_memory`, where tokens are decoded by graphs; return the captured shapes as well."""
    captured: list[Any] = []
    fail = lambda this: CARD.fail_at(CARD.allocs() + 20) if this == call else None  # noqa: E731
    with graphs_known(), noted(StepGraphs, "_captured", lambda call, graphs, one: captured.append(one.shape)):
        return {**out_of_memory(name, owner, function, fail), "captured": captured}


def no_room_in_step_2(call: int) -> None:
    if call == 2:
        CARD.set_capacity(1)  # whatever the step itself gives back is not enough


CASES: dict[str, Callable[[], Any]] = {
    "placement": placement,
    **{
        f"{precision}-{side}": (lambda s=side, p=precision: run_and_resume(s, p))
        for precision in PRECISIONS
        for side in SIDES
    },
    "learned-cpu": lambda: learned_reward("cpu", "auto", "learned-cpu"),
    "learned-card": lambda: learned_reward(DEVICE, "auto", "learned-card"),
    "learned-aside": lambda: learned_reward(DEVICE, "cpu", "learned-aside"),
    "ppo-float32-cpu": lambda: all_roles("cpu", "float32"),
    "ppo-float32-card": lambda: all_roles("card", "float32"),
    "ppo-float16-card": lambda: all_roles("card", "float16"),
    "oom-nowhere": lambda: out_of_memory("oom-nowhere", Trainer, "_rollout", lambda call: None),
    "oom-in-rollout": lambda: out_of_memory("oom-in-rollout", Trainer, "_rollout", fail_once(300)),
    "oom-in-update": lambda: out_of_memory("oom-in-update", grpo, "update", fail_once(600)),
    "oom-in-optimizer": lambda: out_of_memory("oom-in-optimizer", Optimizer, "step", fail_once(30)),
    "hopeless-rollout": lambda: out_of_memory("hopeless-rollout", Trainer, "_rollout", no_room_in_step_2),
    "hopeless-update": lambda: out_of_memory("hopeless-update", grpo, "update", no_room_in_step_2),
    "oom-in-offloaded-update": lambda: out_of_memory(
        "oom-in-offloaded-update", grpo, "update", fail_once(600), offload_checkpoints=True
    ),
    "graphs-float32": lambda: by_graphs("float32"),
    "graphs-nf4": lambda: by_graphs("nf4", rollout_batch_size=3),
    # the evaluation before captures two shapes, the third is the training's
    "oom-in-capture": lambda: by_graphs_out_of_memory("oom-in-capture", StepGraphs, "_captured", 3),
    "oom-beside-graphs": lambda: by_graphs_out_of_memory("oom-beside-graphs", grpo, "update", 2),
    "offloaded-float32": lambda: offloaded(torch.float32),
    "offloaded-bfloat16": lambda: offloaded(torch.bfloat16),
}

if __name__ == "__main__":
    for case, work in CASES.items():
        try:
            facts[case] = work()
        except BaseException:
            facts[case] = {"error": traceback.format_exc()}
    (OUTPUT / "facts.json").write_text(json.dumps(facts))
