"""A frozen transformers model that reads texts: loaded from safetensors alone, in batches bounded by padded tokens."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from lowmem_rlhf.architecture.source import is_local, resolve_model
from lowmem_rlhf.engine.load import DTYPES, first_sentence, quiet
from lowmem_rlhf.engine.whole import Exempt, in_body, load_whole
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.memory import is_out_of_memory, retried, retry_with_smaller
from lowmem_rlhf.planning.placement import encoder_pass_bytes
from lowmem_rlhf.recipe.sections import LearnedReward

T = TypeVar("T")

_UNBOUNDED = 10**6  # transformers writes 10^30 for a tokenizer that knows no limit


@dataclass
class Encoder:
    """A model in evaluation mode and how it reads texts.

    Attributes:
        name: the model's, for messages.
        max_length: tokens that it reads of a text, None where it knows no limit.
        keep: which end of a longer text is read, ``start`` or ``end``.
        batch_tokens: the most tokens of one pass, padding included (a single longer text makes a pass of its own).
    """

    model: Any
    tokenizer: Any
    max_length: int | None
    keep: str
    batch_tokens: int
    name: str = ""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def work_bytes(self) -> int:
        """Predicted bytes of the largest pass, beside the weights."""
        config = self.model.config
        hidden = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * hidden
        longest = min(self.max_length or self.batch_tokens, self.batch_tokens)
        return encoder_pass_bytes(hidden, inner, self.batch_tokens, longest, self.model.dtype.itemsize)

    def to(self, device: str) -> None:
        """Move the model.

        Raises:
            RunError: the device's memory ran out.
        """
        try:
            retried(lambda: self.model.to(torch.device(device)), lambda: "", torch.device(device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(f"the memory of {device} ran out while loading it; set its option device=cpu") from error

    def tokens(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Return the tokens of each text, at least one; without ``special`` only what the text itself says."""
        if not texts:
            return []
        self.tokenizer.truncation_side = "right" if self.keep == "start" else "left"
        length = {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        encoded = self.tokenizer(list(texts), add_special_tokens=special, padding=False, verbose=False, **length)
        return [ids or [self.model.config.pad_token_id] for ids in encoded["input_ids"]]

    @torch.no_grad()
    def read(
        self,
        texts: Sequence[str],
        head: Callable[[Any, torch.Tensor], torch.Tensor],
        special: bool = True,
    ) -> torch.Tensor:
        """Read texts and return one row of fp32 numbers each, (N, W), on the CPU.

        Args:
            texts: N texts.
            head: makes (rows, W) of the model's output and the mask (rows, T) of the tokens that are no padding.
            special: whether the tokenizer puts its special tokens around a text.

        Raises:
            RunError: a number is not finite, or not even the longest text fits into the device's memory.
        """
        ids = self.tokens(texts, special)
        by_text: dict[int, torch.Tensor] = {}

        def work(batch_tokens: int) -> None:
            for batch in batches_by_tokens([len(one) for one in ids], batch_tokens):
                by_text.update(zip(batch, self._pass([ids[i] for i in batch], head), strict=True))

        longest = max((len(one) for one in ids), default=1)
        self.within_memory(work, longest, "the reward's batch_tokens", logging.getLogger(__name__).warning)
        rows = [by_text[index] for index in range(len(ids))]
        for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
            if not bool(torch.isfinite(row).all()):
                raise RunError(
                    f"its model gives {row.tolist()[:3]} for the text {text[:40]!r}; "
                    + (
                        "its weights are broken"
                        if self.model.dtype == torch.float32
                        else "set its option dtype=float32"
                    )
                    + f" (model {self.name!r}, text {index + 1} of {len(texts)})"
                )
        return torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.float32, device="cpu")

    def within_memory(self, work: Callable[[int], T], longest: int, key: str, say: Callable[[str], None]) -> T:
        """Run work in passes of ``batch_tokens``, or of the longest text; of less from then on when memory runs out.

        Args:
            work: is given the tokens of a pass; it must leave nothing behind when it fails.
            longest: tokens of the longest text.
            key: what the tokens of a pass are called in messages.
            say: is given the sentence that they were halved.

        Raises:
            RunError: not even the longest text fits into the device's memory.
        """
        size = max(longest, self.batch_tokens)
        result, fitted = retry_with_smaller(work, size, longest, key, self.model.device, say)
        self.batch_tokens = min(self.batch_tokens, fitted)
        return result

    def _pass(self, ids: list[list[int]], head: Callable[[Any, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        output, mask = self.forward(ids)
        return head(output, mask).float().cpu()

    def forward(self, ids: Sequence[Sequence[int]]) -> tuple[Any, torch.Tensor]:
        """Return the model's output for B lists of tokens, padded at their end, and the mask (B, T) of the tokens."""
        longest = max(len(one) for one in ids)
        tokens = torch.full((len(ids), longest), self.model.config.pad_token_id, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(tokens)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one, dtype=torch.long, device="cpu")
            mask[row, : len(one)] = 1
        tokens, mask = tokens.to(self.model.device), mask.to(self.model.device)
        return self.model(input_ids=tokens, attention_mask=mask), mask


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return batches of indices, the longest texts first, whose ``rows * longest`` is at most ``batch_tokens``.

    The first batch needs the most memory, so that a device which cannot hold it says so at once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def load_encoder(
    auto: Any,
    options: LearnedReward,
    keep: str,
    kind: str,
    may_lack: Exempt = lambda key, model: False,
    may_hold: Exempt = lambda key, model: not in_body(key, model) and key.split(".")[0] not in _parts(model),
    **settings: Any,
) -> Encoder:
    """Load a model and its tokenizer on the CPU, from safetensors, never with code of its own.

    Args:
        auto: transformers' auto class of the model.
        options: which model, and how it reads.
        keep: which end of a text that is too long is read, ``start`` or ``end``.
        kind: what the model is to be, for messages.
        may_lack: whether a weight (its name, the model) may be missing: nothing reads it, or it is to be trained.
        may_hold: whether there may be a weight that the model has no place for: another kind's head.
        settings: more for transformers' ``from_pretrained``.

    Raises:
        UserError: no such model, no safetensors weights, weights that are missing, too many or of another shape, no
            tokenizer, or a ``max_length`` that the model cannot read.
    """
    name, path = options.model, resolve_model(options.model)
    _check_files(name, path, kind)
    with quiet(), torch.device("cpu"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=options.revision, trust_remote_code=False)
            model = load_whole(
                auto,
                path,
                name,
                kind,
                may_lack,
                may_hold,
                "dtype=float32",
                revision=options.revision,
                trust_remote_code=False,
                dtype=DTYPES[options.dtype],
                use_safetensors=True,
                **settings,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(_why(name, kind, error)) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # what transformers makes when there are no files
        raise UserError(f"model {name!r} comes without its tokenizer; put its tokenizer files beside the weights")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"model {name!r} has the wrong tokenizer: it knows {len(tokenizer):,} tokens, and the model "
            f"{model.get_input_embeddings().num_embeddings:,}"
        )
    config = model.config
    config.use_cache = False
    if getattr(config, "pad_token_id", None) is None:  # such models find a text's last token by it
        config.pad_token_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    model.requires_grad_(False).eval()
    length = _length(name, model, tokenizer, options.max_length)
    return Encoder(model, tokenizer, length, keep, options.batch_tokens, name)


def _parts(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_children()}


def _length(name: str, model: Any, tokenizer: Any, wanted: int | None) -> int | None:
    """Return how many tokens are read of a text: what the recipe says, else all that model and tokenizer can."""
    positions = _positions(model)
    if wanted is None:
        return min((n for n in (positions, tokenizer.model_max_length) if n and n < _UNBOUNDED), default=None)
    least = tokenizer.num_special_tokens_to_add() + 1
    if wanted < least or (positions and wanted > positions):
        raise UserError(
            f"max_length: got {wanted}; model {name!r} reads {least} to {positions or 'any number of'} tokens"
        )
    return wanted


def _positions(model: Any) -> int | None:
    """Return the longest sequence that a model has positions for; RoBERTa's begin after the padding's own."""
    for key, module in model.named_modules():
        if key.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return getattr(model.config, "max_position_embeddings", None)


def _check_files(name: str, path: str, kind: str) -> None:
    if path.endswith(".gguf"):
        raise UserError(f"model {name!r} is a GGUF file, and a {kind} is read from a folder with safetensors weights")
    if is_local(path) and not any(Path(path).glob("*.safetensors")):
        raise UserError(_no_safetensors(name))


def _no_safetensors(name: str) -> str:
    return (
        f"model {name!r} has no safetensors weights, and pickled ones are never read; take a model or a revision that "
        "has them, or save it once with save_pretrained"
    )


def _why(name: str, kind: str, error: Exception) -> str:
    text = str(error)
    if "safetensors" in text and isinstance(error, OSError):
        return _no_safetensors(name)
    if "trust_remote_code" in text:
        return f"model {name!r} needs Python code of its own, which a reward never runs; take another model"
    if "Unrecognized configuration class" in text:
        return f"model {name!r} is no {kind}: transformers has none of its architecture"
    return (
        f"model {name!r} cannot be loaded: {first_sentence(error)}; give a Hub id that can be reached, or a local "
        "folder in the transformers format with safetensors weights"
    )
