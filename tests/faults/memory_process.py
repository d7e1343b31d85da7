"""Out-of-memory errors on a card: `python memory_process.py KIND|VCARD_FOLDER MODEL OUTPUT CASE [KIND=N ...]`.

Runs a case undisturbed, then once for each fault, and writes OUTPUT/CASE.json: one row a fault with what happened and
how far the adapter is from the undisturbed one's. A fault is an allocation that fails once, for every line of the
package that allocates ("sites", N or all, without those in the file after "but=") or a random one ("random"); or a card
that from the second step on has no more room than so many bytes ("shortages"), from which the run is resumed where it
ended. Run it in a process of its own: the card is registered for all of it.
"""

import contextlib
import gc
import io
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from cards import card_of, its_attention
from safetensors.torch import load_file
from tiny_classifiers import save_classifier
from tiny_runs import SYMBOLS, save_tiny_model, tiny_recipe, write_jsonl

import lowmem_rlhf
from lowmem_rlhf import cli
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.loop import Loop

PACKAGE = str(Path(lowmem_rlhf.__file__).parent)
CARD, DEVICE = card_of(sys.argv[1])
MODEL, OUTPUT, CASE = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
COUNTS = {"sites": 0, "random": 0, "shortages": 0} | {
    key: int(value) for key, _, value in (one.partition("=") for one in sys.argv[5:]) if key != "but"
}
BUT = {line for one in sys.argv[5:] if one.startswith("but=") for line in Path(one[4:]).read_text().split()}
NO_EVALUATION: dict[str, Any] = {"eval_size": 0}
SEED = 20  # of the random faults
ROOM = (0, 1 << 13, 1 << 15, 1 << 17, 1 << 19, 1 << 21)  # bytes of a card that is short of memory


def stages() -> tuple[Path, Path]:
    """Return the runs that others go on from, a fine-tuning's and a reward model's; both are made on the CPU."""
    sft, judge = OUTPUT / f"{CASE}-sft", OUTPUT / f"{CASE}-judge"
    given: dict[str, Any] = {"training": {"max_steps": 1}, "hardware": {"device": "cpu"}, "rewards": []}
    train(tiny_recipe(MODEL, algorithm="sft", data=NO_EVALUATION, sft={"max_length": 32}, **given), sft)
    data = {"train": str(pairs()), "template": None, "prompt": "prompt", "train_size": None, "eval_size": 0}
    train(
        tiny_recipe(MODEL, algorithm="reward_model", **{**given, "data": data, "reward_model": {"max_length": 32}}),
        judge,
    )
    return sft, judge


def pairs() -> Path:
    rows = [{"prompt": f"{a}+2=", "chosen": "12", "rejected": "abc"} for a in range(8)]
    return write_jsonl(OUTPUT / "pairs.jsonl", rows)


def grpo() -> Recipe:
    return of_case(grpo={"beta": 0.04, "num_iterations": 2})


def nf4() -> Recipe:
    return of_case(hardware={"device": DEVICE, "quantization": "nf4", "compute_dtype": "bfloat16"})


def fp16() -> Recipe:
    """GRPO with a scaled loss."""
    return of_case(hardware={"compute_dtype": "float16"}, data={"eval_size": 2})


def recurrent() -> Recipe:
    """GRPO with layers that pass a state on, as Qwen3.5 has them."""
    kinds = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_value_heads": 4}
    sizes = {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return of_case(save_tiny_model(OUTPUT / "recurrent-model", 0, "qwen3_5_text", **kinds, **sizes))


def experts() -> Recipe:
    """GRPO with experts in NF4, which lie in host memory."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    hardware = {"quantization": "nf4", "compute_dtype": "float32", "offload_experts": True}
    return of_case(save_tiny_model(OUTPUT / "experts-model", 0, "qwen3_moe", **sizes), hardware=hardware)


def wide() -> Recipe:
    """GRPO with Gemma 4 in float16: an fp32 residual stream, embeddings of each layer, keys that layers share."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    sizes = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 5, "hidden_size_per_layer_input": 8}
    shared = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": len(SYMBOLS)}
    model = save_tiny_model(OUTPUT / "wide-model", 0, "gemma4_text", **kinds, **sizes, **shared)
    return of_case(model, hardware={"compute_dtype": "float16"})


def learned() -> Recipe:
    """GRPO with a classifier on the card as its reward."""
    save_classifier(folder := OUTPUT / "classifier")
    options = {"model": str(folder), "label": 1, "batch_tokens": 64, "device": DEVICE}
    rewards = [{"function": "classifier", "options": options}, {"function": "length", "options": {"target": 12}}]
    return of_case(rewards=rewards)


def ppo() -> Recipe:
    sft, judge = stages()
    return of_case(
        algorithm="ppo",
        adapter=str(sft),
        rewards=[{"function": "reward_adapter", "options": {"adapter": str(judge)}}],
        ppo={"num_ppo_epochs": 2, "num_mini_batches": 2, "bootstrap_truncated": True, "entropy_coef": 0.01},
    )


def sft() -> Recipe:
    return of_case(algorithm="sft", sft={"max_length": 32})


def dpo() -> Recipe:
    sft, _ = stages()
    data = {"train": str(pairs()), "template": None, "prompt": "prompt", "train_size": None, "eval_size": 2}
    return of_case(
        algorithm="trl/dpo", adapter=str(sft), data=data, rewards=[], trl={"max_length": 32}, training={"max_steps": 2}
    )


def of_case(model: Path = MODEL, **sections: Any) -> Recipe:
    sections.setdefault("training", {"max_steps": 2})
    sections.setdefault("hardware", {"device": DEVICE})
    sections["hardware"] = {"device": DEVICE, "probe": True, **sections["hardware"]}
    return tiny_recipe(model, **sections)


CASES = {case.__name__: case for case in (grpo, nf4, fp16, learned, ppo, sft, dpo, recurrent, experts, wide)}


def run(recipe: Path, output: Path, *more: str) -> dict[str, Any]:
    """Run the command line; return its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["lowmem-rlhf", "train", str(recipe), "--output", str(output), *more]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), its_attention(DEVICE):
        try:
            cli.main()
            code: Any = 0
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            code, err = "traceback", io.StringIO(traceback.format_exc())
    CARD.fail_at(-1)
    gc.collect()
    return {"code": code or 0, "out": out.getvalue(), "err": err.getvalue()}


def learned_tensors(output: Path) -> dict[str, torch.Tensor]:
    """Return everything that a run trained."""
    folder = output / "adapter"
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {k}": v for file in files for k, v in load_file(file).items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of an entry; infinite where a tensor is missing."""
    if list(one) != list(other):
        return float("inf")
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


@contextlib.contextmanager
def recorded(sites: dict[str, int]) -> Iterator[None]:
    """Fill in for every line of the package that allocates the number of its first allocation in the block."""
    first = CARD.allocs()
    state = {"count": first, "line": ""}

    def charge() -> None:
        if (count := CARD.allocs()) > state["count"]:
            if state["line"]:
                sites.setdefault(state["line"], state["count"] - first)
            state["count"] = count

    def lines(frame: FrameType, event: str, argument: Any) -> Any:
        charge()
        state["line"] = f"{os.path.relpath(frame.f_code.co_filename, PACKAGE)}:{frame.f_lineno}"
        return lines

    def calls(frame: FrameType, event: str, argument: Any) -> Any:
        return lines if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(calls)
    try:
        yield
    finally:
        sys.settrace(None)
        charge()


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / f"{CASE}.yaml"
    file.write_text(CASES[CASE]().to_yaml())
    folder, sites = OUTPUT / CASE, {}
    run(file, folder)  # what is made once a process
    shutil.rmtree(folder)
    began = CARD.allocs()
    with recorded(sites):
        clean = run(file, folder)
    allocations = CARD.allocs() - began
    assert clean["code"] == 0, clean
    wanted = learned_tensors(folder)
    rows = []
    chosen = [(line, number) for line, number in sites.items() if line not in BUT]
    draws = random.Random(SEED)
    if COUNTS["sites"] < len(chosen):
        chosen = draws.sample(chosen, COUNTS["sites"])
    numbers = [draws.randrange(allocations) for _ in range(COUNTS["random"])]
    for site, number in [*chosen, *(("random", number) for number in numbers)]:
        rows.append(one_fault(file, site, number, wanted))
    rows += [one_shortage(file, room, wanted) for room in ROOM[: COUNTS["shortages"]]]
    facts = {"allocations": allocations, "sites": len(sites), "faults": rows}
    (OUTPUT / f"{CASE}.json").write_text(json.dumps(facts, indent=1))


def one_fault(file: Path, site: str, number: int, wanted: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Let one allocation of a run fail; return what came of it."""
    folder = OUTPUT / f"{CASE}-faulty"
    shutil.rmtree(folder, ignore_errors=True)
    CARD.fail_at(CARD.allocs() + number)
    done = run(file, folder)
    row = {"site": site, "allocation": number, "code": done["code"]}
    if done["code"] == 0:
        row["distance"] = distance(learned_tensors(folder), wanted)
    else:
        row["said"] = done["err"][-4000:]
    said = [line for line in (done["out"] + done["err"]).splitlines() if "memory ran out" in line]
    return {**row, "noticed": said[:3]}


def one_shortage(file: Path, room: int, wanted: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Let a run have so many bytes from its second step on; resume it with all of them where it ended."""
    folder = OUTPUT / f"{CASE}-short"
    shutil.rmtree(folder, ignore_errors=True)
    real = Loop._attempt

    def short(loop: Loop, progress: Any) -> Any:
        if loop.step == 1:
            gc.collect()
            CARD.set_capacity(min(CARD.live(), live.setdefault("then", CARD.live())) + room)
        return real(loop, progress)

    live: dict[str, int] = {}
    Loop._attempt = short  # type: ignore[method-assign]
    done = run(file, folder)
    Loop._attempt = real  # type: ignore[method-assign]
    CARD.set_capacity(2**40)
    row = {"site": "shortage", "room": room, "code": done["code"], "said": done["err"][-4000:]}
    row["noticed"] = [line for line in (done["out"] + done["err"]).splitlines() if "memory ran out" in line]
    if done["code"] == 1:
        row["resumed"] = run(file, folder, "--resume")["code"]
    row["distance"] = distance(learned_tensors(folder), wanted)
    return row


if __name__ == "__main__":
    main()
