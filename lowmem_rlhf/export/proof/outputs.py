"""The live policy's outputs on sample texts, which an export is compared with.

Shapes: N sequences, L tokens of a sequence, V vocabulary.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.engine.load import DTYPES
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import BatchLimits, head_outputs, with_bootstrap_position
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.engine.wide import round_to
from lowmem_rlhf.export.proof.texts import sample_sequences
from lowmem_rlhf.hardware.memory import free_bytes, release
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.inference.opening import open_trained
from lowmem_rlhf.planning.memory.resident import LOGITS_BYTES
from lowmem_rlhf.recipe.schema import Recipe

ROOM = 0.8  # of the free memory that a model may take

SequenceLogits = list[torch.Tensor]  # one model's, (L - 1, V) of each sequence, fp32 on the CPU


@dataclass(frozen=True)
class Logits:
    """A policy's logits and those of its base without the adapter, on the same sequences."""

    policy: SequenceLogits
    base: SequenceLogits


@dataclass(frozen=True)
class PolicyOutputs:
    """The outputs of the live policy and of its base.

    Attributes:
        ids: token sequences.
        source: where they are from.
        logits: computed as the run computes.
        exact_logits: of the same weights with fp32 arithmetic, so that a comparison sees only the rounding of the
            export; None where there was no room.
        scores, exact_scores: of a reward model, in place of logits: one score a sequence, (N,).
    """

    recipe: Recipe
    ids: list[list[int]]
    source: str
    compute_dtype: str
    logits: Logits
    exact_logits: Logits | None = None
    scores: torch.Tensor | None = None
    exact_scores: torch.Tensor | None = None


@torch.no_grad()
def policy_outputs(opened: OpenRun, device: str | None) -> PolicyOutputs:
    """Open the run's base with its policy, and compute the outputs of both on sample texts.

    Raises:
        UserError, RunError: as `open_policy`.
    """
    base, recipe = open_trained(opened, device), opened.recipe
    ids, source = sample_sequences(opened.directory, recipe, base.tokenizer, base.stop_ids)
    settings = asdict(opened.plan.settings)
    dtype, is_reward_model = settings["compute_dtype"], recipe.spec.output == "scores"
    if not is_reward_model:
        ids = _within(ids, base.head.vocabulary)
    compute: Callable[[SharedBase, Sequence[Sequence[int]]], Any] = _scores if is_reward_model else _logits
    outputs = compute(base, ids)
    exact = outputs if is_exact(settings) else None
    if exact is None and in_float32(base.model, DTYPES[dtype], base.device):
        base.dtype = torch.float32
        exact = compute(base, ids)
    used = base.device
    del base
    release(used)
    if is_reward_model:
        return PolicyOutputs(recipe, ids, source, dtype, Logits([], []), scores=outputs, exact_scores=exact)
    return PolicyOutputs(recipe, ids, source, dtype, outputs, exact)


def is_exact(settings: dict[str, Any]) -> bool:
    """Whether a base of these settings computes in fp32 as it is; int8's products round to 8 bits in every dtype."""
    return bool(settings["compute_dtype"] == "float32" and settings["quantization"] != "int8")


def _logits(base: SharedBase, ids: Sequence[Sequence[int]]) -> Logits:
    return Logits(*(role_logits(base, role, ids) for role in (POLICY, REFERENCE)))


def in_float32(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Let a model compute in fp32 with the numbers that its weights stand for in ``dtype``, one dense layer at a time.

    Returns:
        False, and nothing is changed, where the device has no room for its other weights in fp32.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    grows = sum(p.numel() * (4 - p.itemsize) for p in model.parameters() if p.is_floating_point())
    if grows > ROOM * free_bytes(device):
        return False

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        return F.linear(x, exact_weight(layer, dtype), bias)

    for module in model.modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            module.forward = partial(forward, module)  # type: ignore[method-assign]
    torch.nn.Module.float(model)  # transformers' own refuses a quantized model, for fear of its codes
    round_to(model, torch.float32)
    return True


def exact_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers (out, in) of a bitsandbytes layer in fp32: those that it multiplies with in ``dtype``."""
    from bitsandbytes.nn import Linear8bitLt

    return dense_weight(layer, torch.float32 if isinstance(layer, Linear8bitLt) else dtype).float()


def _within(ids: list[list[int]], vocabulary: int) -> list[list[int]]:
    """Return as many of the first sequences as there is room to keep several models' logits of; at least one."""
    fitting: list[list[int]] = []
    for one in ids:
        if fitting and 4 * (sum(map(len, fitting)) + len(one)) * vocabulary > LOGITS_BYTES:
            break
        fitting.append(one)
    return fitting


@torch.no_grad()
def role_logits(base: SharedBase, role: str, ids: Sequence[Sequence[int]]) -> SequenceLogits:
    """Return for each sequence the logits (L - 1, V) of its next tokens in a role, fp32 on the CPU.

    All go through the base in one pass, since every pass dequantizes the weights.
    """
    groups = [Group(one[:1], [one[1:]], [row]) for row, one in enumerate(ids)]
    batch = base.layout.lay_out(groups, base.device)
    with base.role(role):
        states = base.states(batch).index_select(0, batch.predict).split(batch.lengths)
        logits = {row: base.head.logits(part).float().cpu() for row, part in zip(batch.rows, states, strict=True)}
    return [logits[row] for row in range(len(ids))]


@torch.no_grad()
def _scores(base: SharedBase, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return a reward model's score of each sequence, read at its last token, (N,) fp32 on the CPU."""
    groups = with_bootstrap_position([Group(one[:1], [one[1:]], [row]) for row, one in enumerate(ids)])
    outputs = head_outputs(base, POLICY, groups, BatchLimits(1.0, sys.maxsize, 1))
    return torch.stack([outputs[row][-1] for row in range(len(ids))]).cpu()
