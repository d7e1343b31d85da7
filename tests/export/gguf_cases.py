"""Tiny models with tokenizers of the known kinds, as folders that a GGUF is written from. Not a test module."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NODE = Path(os.environ.get("NODE_LLAMA_CPP") or Path.home() / ".cache" / "lowmem_rlhf" / "node")
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
TEXTS = [
    "Hello world",
    "  two spaces, then 12345 and 6.78\n\n\tI've TOLD you'LL see",
    "<s>user\nWas kostet das Öl? 東京 🚀</s> <think>a</think>b",
    "x = [i**2 for i in range(10)]\r\n",
]
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. 1234 5678 90, and 2024!",
    "I've told you that she'll see what it's worth: 3.14 or 100%.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "HELLO World, hello world. MixedCase CamelCase snake_case\n\n\n  indented\n\ttabbed",
    "Öl und Käse für 12 Euro; 東京 и Москва 🚀",
] * 4


def split(pattern: str) -> Any:
    """Return the pre-tokenizer of an expression before the step to bytes, as tokenizer.json files have it."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def byte_level(pre_tokenizer: Any, size: int = 400, **options: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained on some lines; ``options`` go to the BPE model."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return _wrapped(tokenizer)


def sentencepiece(prefix: bool, size: int = 500) -> PreTrainedTokenizerFast:
    """Return SentencePiece's BPE in tokenizer.json's form, as Llama 2's (with a prefix space) and Gemma's are."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    bytes_ = [f"<0x{index:02X}>" for index in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, special_tokens=[*SPECIAL, *bytes_], max_token_length=8, show_progress=False
    )
    words = Tokenizer(models.BPE())  # merges are learned within words, and applied to whole texts, as theirs
    words.normalizer, words.pre_tokenizer = tokenizer.normalizer, pre_tokenizers.Split("▁", "merged_with_next")
    words.train_from_iterator(_CORPUS, trainer)
    learned = json.loads(words.to_str())["model"]
    content = json.loads(tokenizer.to_str())
    content["model"] |= {"vocab": learned["vocab"], "merges": learned["merges"]}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Any) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def model_folder(family: str, folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """Write a tiny model, stored as float16, with a tokenizer."""
    model = tiny_model(family, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama_cpp(gguf: Path, **asked: Any) -> dict[str, Any]:
    """Return what llama.cpp makes of a GGUF (see llama_cpp.mjs); skip the test where it is not installed."""
    if shutil.which("node") is None or not (NODE / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip(
            f"no llama.cpp: {NODE} (or $NODE_LLAMA_CPP) has no node_modules/node-llama-cpp; in it run "
            "`npm install --ignore-scripts node-llama-cpp @node-llama-cpp/linux-x64`"
        )
    question = json.dumps({"modules": str(NODE), "gguf": str(gguf), **asked})
    command = ["node", str(SCRIPT)]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def mean_kl(logits: torch.Tensor, probabilities: list[list[float]]) -> float:
    """Return the mean KL of llama.cpp's probabilities to logits (T, V)."""
    p = torch.softmax(logits.double(), -1)
    q = torch.tensor(probabilities, dtype=torch.float64)[: len(p)]
    q = (q / q.sum(-1, keepdim=True)).clamp(min=1e-12)
    return float((p * (p.clamp(min=1e-30).log() - q.log())).sum(-1).mean())
