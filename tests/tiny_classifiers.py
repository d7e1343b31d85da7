"""Tiny random sequence classifiers and sentence encoders on disk, with a tokenizer of words. Not a test module."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WORDS = [f"w{n}" for n in range(40)] + list("0123456789abcdefgh+-?.=")
LABELS = {0: "OTHER", 1: "Drama", 2: "verse"}

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# name -> its configuration; every one reads 64 tokens
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "max_position_embeddings": 64},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    # RoBERTa counts positions from the one after the padding's; its padding is token 1 elsewhere, but need not be
    "roberta": {**_SIZES, "max_position_embeddings": 65, "bos_token_id": 1, "eos_token_id": 2},
    "electra": {**_SIZES, "embedding_size": 16, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
}


def word_tokenizer(special: bool = True, **settings: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, which puts [CLS] and [SEP] around a text unless it is GPT's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not special:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]", **settings)
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **settings)


def save_classifier(folder: Path, family: str = "bert", labels: dict[int, str] | None = None, **changes: Any) -> Path:
    """Write a random classifier whose scores differ well between texts; return its folder."""
    labels = LABELS if labels is None else labels
    return _save(folder, AutoModelForSequenceClassification, family, id2label=labels, num_labels=len(labels), **changes)


def save_sentence_encoder(folder: Path, pooling: dict[str, Any] | None = None, max_seq_length: int = 20) -> Path:
    """Write a random encoder with the files that sentence-transformers puts beside it; return its folder."""
    _save(folder, AutoModel, "bert")
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    return folder


def _save(folder: Path, auto: Any, family: str, **changes: Any) -> Path:
    padding = {} if family == "gpt2" else {"pad_token_id": 0}
    settings = {**FAMILIES[family], **padding, "vocab_size": len(SPECIAL + WORDS), **changes}
    model = auto.from_config(AutoConfig.for_model(family, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.0 if "embed" in name or "wte" in name else 1.5 * p.shape[-1] ** -0.5
            noise = torch.randn(p.shape, generator=generator)
            p.add_(noise, alpha=0.2) if p.ndim < 2 else p.copy_(noise * scale)
    model.save_pretrained(folder)
    word_tokenizer(special=family != "gpt2").save_pretrained(folder)
    return folder
