"""Run directories of each kind with everything that a page shows, without training. Not a test module."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml
from page_runs import lines

EVIL = "</script><img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script><b>bold</b>"
STEPS = 60

_DEVICE = {
    "name": "NVIDIA GeForce RTX 2080 Ti",
    "total_bytes": 11 << 30,
    "free_bytes": 10 << 30,
}
_PHASES = {
    "rollout": {"weights": 900, "embeddings": 400, "adapters": 90, "kv_cache": 2600, "rollout_copy": 1500, "rest": 9},
    "scoring": {"weights": 900, "embeddings": 400, "adapters": 90, "layer_activations": 800},
    "update": {
        "weights": 900, "embeddings": 400, "adapters": 90, "gradients": 90, "stored_activations": 4200,
        "logits_tile": 500, "positions": 7, "scored_states": 60, "allocator": 300,
    },
}  # fmt: skip


def plan(torch_device: str = "cuda") -> dict[str, Any]:
    """Return a plan."""
    phases = {name: {part: size << 20 for part, size in parts.items()} for name, parts in _PHASES.items()}
    peak = max(sum(parts.values()) for parts in phases.values())
    return {
        "fits": True, "device": {**_DEVICE, "torch_device": torch_device}, "profile": "rtx-2080-ti",
        "settings": {"quantization": "nf4", "lora": {"r": 16, "lora_alpha": 32}, "micro_batch_tokens": 2048},
        "reasons": {"quantization": "16-bit weights take 12.4 GiB of 9.6 GiB", "lora": "rank 16: enough for RL"},
        "memory": {"budget_bytes": int(9.6 * 2**30), "peak_bytes": peak, "phases": phases},
        "time": {
            "phases": {"rollout": 5.5, "score": 0.7, "update": 9.0}, "step_seconds": 15.2, "run_seconds": 1100.0,
            "evaluations": 3, "measured": {"ratio": 1.12},
        },
    }  # fmt: skip


def _shared(step: int, rng: random.Random) -> dict[str, Any]:
    return {
        "grad_norm": 0.5 + rng.random(), "learning_rate": 1e-4 * (1 - step / 61), "tokens/trained": 4000 + step,
        "time/rollout": 6 + rng.random(), "time/score": 0.8, "time/update": 9 + rng.random(), "time/step": 16.5,
        "memory/peak_bytes": 6_400_000_000 + 1_000_000 * step, "own/thing": math.sin(step),
    }  # fmt: skip


def _sampled(step: int, rng: random.Random) -> dict[str, Any]:
    share = min(0.95, 0.05 + step / STEPS + 0.1 * rng.random())
    return {
        "step": step, "reward/mean": share, "reward/std": math.sqrt(share * (1 - share)),
        "reward/exact": share, "reward/format": min(1.0, share * 1.2), "prompt/mean_length": 46.0,
        "completion/mean_length": 140 - step, "completion/truncated": max(0.0, 0.4 - step / 80),
        "groups/without_signal": 0.25, "tokens/generated": 5000, "kl": step / 500, "entropy": 1.3 - step / 100,
        "sampling/logp_difference": 2e-5,
    }  # fmt: skip


def grpo_row(step: int, rng: random.Random) -> dict[str, Any]:
    """Return a step of GRPO on two tasks."""
    tasks = {f"task/{name}/reward/mean": step / STEPS / (2 - place) for place, name in enumerate(("sums", "words"))}
    clipped = {"clip_ratio/low": 0.02, "clip_ratio/high": 0.01 * rng.random()}
    return {**_sampled(step, rng), "loss": 0.1 * rng.random(), **clipped, **tasks, **_shared(step, rng)}


def ppo_row(step: int, rng: random.Random) -> dict[str, Any]:
    """Return a step of PPO."""
    return {
        **_sampled(step, rng), "objective/kl": step / 20, "objective/kl_coef": 0.05 * 1.01**step,
        "objective/scores": step / STEPS, "objective/non_score_reward": -step / 400, "objective/rlhf_reward": step / 80,
        "value/explained_variance": 1 - 2 / step, "value/mean": 0.4, "value/returns_mean": step / STEPS,
        "value/loss": 1 / step, "value/clip_fraction": 0.03, "policy/loss": -0.03 * rng.random(), "loss": 0.02,
        "policy/approx_kl": 0.01, "policy/approx_kl_k3": 0.012, "policy/clip_fraction": 0.1 * rng.random(),
        "policy/ratio_mean": 1.0, "policy/ratio_min": 0.3, "policy/ratio_max": 4.0, "policy/epochs": 4,
        **_shared(step, rng),
    }  # fmt: skip


def sft_row(step: int, rng: random.Random) -> dict[str, Any]:
    """Return a step of SFT."""
    held_out = {"eval/loss": 2 / (1 + step / 20)} if step % 10 == 0 else {}
    loss = 2.1 / (1 + step / 20) + 0.1 * rng.random()
    return {"step": step, "loss": loss, "entropy": loss / 2, "tokens/learned": 1200, **held_out, **_shared(step, rng)}


_ROWS = {"grpo": grpo_row, "ppo": ppo_row, "sft": sft_row}


def _evaluation(kind: str, steps: int) -> dict[str, Any]:
    def row(step: int) -> dict[str, Any]:
        if kind == "sft":
            loss = 2.2 / (1 + step / 20)
            measures, headline = {"loss": loss, "perplexity": math.exp(loss)}, "loss"
        else:
            share = 0.05 + 0.7 * step / STEPS
            measures, headline = (
                {"accuracy": share, "reward/mean": share, "completion/mean_length": 140.0 - step},
                "accuracy",
            )
        bounds = {name: [0.9 * value, 1.1 * value] for name, value in measures.items()}
        counts = {"problems": 128, "samples": 1, "temperature": 1.0}
        return {"step": step, **measures, **counts, "headline": headline, "intervals": bounds}

    during = [row(step) for step in range(20, steps + 1, 20)]
    return {"before": row(0), "during": during, **({"after": row(steps)} if steps == STEPS else {})}


def _samples(steps: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        for place in range(2):
            right = (step + place) % 3 == 0
            rows.append({
                "step": step, "prompt": [{"role": "user", "content": f"What is {place} + {step % 5}?"}],
                "completion": f"The answer of step {step} is {place + step % 5 + (not right)}.",
                "rewards": {"exact": float(right), "format": 1.0}, "advantage": 0.5 - right, "tokens": 9 + step % 4,
                "truncated": step % 7 == 0, "task": ("sums", "words")[place],
            })  # fmt: skip
    if rows:
        rows[-1]["completion"] = EVIL
    return rows


def write_look(path: Path, kind: str, name: str, steps: int = STEPS, seed: int = 0, device: str = "cuda") -> Path:
    """Write a run that took so many of its `STEPS`, and is finished if it took all; return its folder."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    rewards = (
        [] if kind == "sft" else [{"function": "exact", "name": "exact"}, {"function": "format", "name": "format"}]
    )
    recipe = {
        "name": name, "description": f"A {kind} run {EVIL}", "algorithm": kind, "model": "org/small-model",
        "training": {"max_steps": STEPS}, "rewards": rewards,
    }  # fmt: skip
    files = {
        "recipe.yaml": yaml.safe_dump(recipe),
        "metrics.jsonl": lines(_ROWS[kind](step, rng) for step in range(1, steps + 1)),
        "samples.jsonl": lines([] if kind == "sft" else _samples(steps)),
        "plan.json": json.dumps(plan(device)),
        "evaluation.json": json.dumps(_evaluation(kind, steps)),
        "inputs.json": json.dumps({"base": {"model": "org/small-model", "weights": "0123456789abcdef"}}),
    }
    for file, text in files.items():
        (path / file).write_text(text, encoding="utf-8")
    if steps == STEPS:
        (path / "adapter").mkdir()
    outcome = {
        "made": "2026-01-02 03:04 UTC", "steps": steps, "data": "sums", "counts": {"problem": 64}, "samples": 1,
        "temperature": 0.0, "headline": "accuracy", "method": "Wilson intervals",
        "results": {"policy": {"accuracy": {"value": 0.7, "low": 0.6, "high": 0.8}}},
    }  # fmt: skip
    (path / "evaluations.jsonl").write_text(lines([outcome]))
    return path
