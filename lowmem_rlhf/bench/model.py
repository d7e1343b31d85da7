"""The model that is measured: the one that is named, the cached one of the right sizes, or random weights of them."""

from pathlib import Path
from typing import Any

import torch

from lowmem_rlhf.architecture import hub
from lowmem_rlhf.architecture.catalogue import entries
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.architecture.source import is_local, resolve_model
from lowmem_rlhf.bench.work import Work
from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.files import check_room
from lowmem_rlhf.hardware.cuda import torch_build
from lowmem_rlhf.hardware.detect import torch_reaches
from lowmem_rlhf.progress import ProgressCallback

FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def prepare(work: Work, progress: ProgressCallback) -> dict[str, Any]:
    """Choose the model, fetch it where it is named, and see whether torch can use the device.

    Returns:
        ``model`` as a recipe names it, ``weights`` (``own`` or ``random``), and ``cuda``, the version that torch
        was built for, or None.

    Raises:
        UserError: torch cannot use the device, or the model that was named cannot be had.
    """
    if not torch_reaches(work.device):
        raise UserError(
            f"the card is here, but this torch ({torch.__version__}) cannot use it; install a CUDA build of torch, or "
            "measure the CPU with --device cpu"
        )
    if work.named:
        found = {"model": _fetched(work.model), "weights": "own"}
    elif cached := _cached(work.model):
        found = {"model": str(cached), "weights": "own"}
    else:
        found = {"model": str(random_model(work.model, Path(work.folder) / "model")), "weights": "random"}
    progress(1, 1)
    return {**found, "cuda": torch_build()}


def _cached(model: str) -> Path | None:
    """Return the folder of a Hub model whose weights are in the Hub's cache; None where they are not."""
    config = hub.cached_config(model)
    return config.parent if config and (config.parent / "model.safetensors").is_file() else None


def _fetched(model: str) -> str:
    resolved = resolve_model(model)
    if is_local(resolved):
        return resolved
    model_dimensions(model)  # names what is wrong with an id
    if cached := _cached(model):
        return str(cached)
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(resolved, allow_patterns=FILES)
    except Exception as error:  # the HTTP library under huggingface_hub, and so its errors, changes between releases
        raise UserError(f"--model: {model!r} cannot be fetched: {one_line(error)}") from error


def random_model(model: str, folder: Path) -> Path:
    """Write random float16 weights of a catalogue model's sizes, and a tokenizer of bytes, into ``folder``.

    Raises:
        RunError: the disk has no room.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    entry = entries()[model]
    fields = dict(entry.config)
    fields.pop("torch_dtype", None)
    check_room(folder, 2 * entry.parameters, "or let TMPDIR name a folder on another disk")
    config = AutoConfig.for_model(
        fields.pop("model_type"), **{**fields, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """Return a tokenizer of bytes, its ids below 260: padding, beginning and end come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
