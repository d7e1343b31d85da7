"""What stock transformers says with the adapter in stock peft: the live policy and every export are held against it.

Nothing of our own forward passes, fused layers or adapters takes part, so a fault of theirs shows. The models come one
after another, and of each only the logits of a few hundred tokens stay.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lowmem_rlhf.architecture.adapters import WEIGHTS
from lowmem_rlhf.engine.load import DTYPES, first_sentence, load_base
from lowmem_rlhf.engine.whole import differing_tensors
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.proof.compare import (
    EXACT,
    ROUNDED,
    STORED_TIMES,
    TIMES,
    UNMEASURED,
    Bound,
    Comparison,
    bound,
    compare,
)
from lowmem_rlhf.export.proof.live import ROOM, Live, Logits, Said, in_float32, is_exact
from lowmem_rlhf.export.proof.storage import StoredModel
from lowmem_rlhf.export.shards import NAMES, read_tensors
from lowmem_rlhf.export.source import base_folder
from lowmem_rlhf.hardware.memory import free_bytes, release
from lowmem_rlhf.recipe.schema import Recipe

LIVE = "the live policy"
EXACT_ARITHMETIC, ARITHMETIC = "with float32 arithmetic", "with {} arithmetic"


@dataclass(frozen=True)
class Reference:
    """What an export is held against.

    Attributes:
        said: of the policy and of its base without adapter.
        name: of it, in messages.
        explained: by a kind of numbers, what storing the weights as that (after those before it) changes.
        least: mean KL that is allowed however the export is stored.
    """

    said: Said
    name: str
    explained: dict[str, Comparison] = field(default_factory=dict)
    least: float = EXACT

    def bound(self, tokens: int, kind: str, arithmetic: str = "float32") -> Bound:
        """Return what a right export that is stored as this kind, and computes in this dtype, may be off by."""
        least = max(self.least, EXACT if arithmetic == "float32" else UNMEASURED[arithmetic])
        if kind == "float32":
            return bound(tokens, least=least)
        if kind not in self.explained:
            return bound(tokens, least=max(least, UNMEASURED[kind]))
        return bound(tokens, [self.explained[kind]], least, STORED_TIMES if kind in DTYPES else TIMES)


@dataclass(frozen=True)
class Held:
    """The live policy held against stock.

    Attributes:
        judged: the comparisons and their bounds, for export.json.
        explained: see `Reference`.
        logits: what stock said, with the arithmetic of ``against``.
        against: the live policy with the same arithmetic.
    """

    judged: list[dict[str, Any]]
    explained: dict[str, Comparison]
    logits: Logits
    against: Said


@contextmanager
def stock_adapter(folder: Path, recipe: Recipe, device: torch.device, settings: dict[str, Any]) -> Iterator[Any]:
    """Load a stock base in the run's precision, and an adapter onto it by peft.

    Raises:
        RunError: peft cannot load the adapter.
    """
    from peft import PeftModel, get_peft_model_state_dict

    precision = (settings["quantization"], settings["compute_dtype"])
    base, _ = load_base(recipe.model, *precision, device, recipe.revision, recipe.trust_remote_code)
    try:
        model = PeftModel.from_pretrained(base, str(folder), torch_device=str(device)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunError(f"the adapter cannot be loaded by peft: {first_sentence(error)}; nothing was kept") from error
    stored = load_file(folder / WEIGHTS, device="cpu")
    if said := differing_tensors(stored, get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise RunError(f"the adapter does not fit what peft makes of it: its files {said}; nothing was kept")
    yield model
    del base, model
    release(device)


@torch.no_grad()
def stock_logits(model: Any, ids: Sequence[Sequence[int]]) -> Logits:
    """Return for each sequence of L tokens a stock model's logits (L - 1, V), fp32 on the CPU."""
    inputs = (torch.tensor([one], dtype=torch.long, device=model.device) for one in ids)
    return [model(input_ids=one, use_cache=False).logits[0, :-1].float().cpu() for one in inputs]


@torch.no_grad()
def _side_by_side(model: Any, ids: Sequence[Sequence[int]]) -> Logits:
    """Return `stock_logits` with all sequences in one pass, as rows that are filled up at their end.

    Another order of sums, and quantized layers are made dense once. Where little is alike in length each goes alone,
    beside a copy of itself.
    """
    longest = max(map(len, ids))
    if len(ids) * longest > 2 * sum(map(len, ids)):
        return [found for one in ids for found in _side_by_side(model, [one, one])[:1]]
    rows = [[*one, *([one[-1]] * (longest - len(one)))] for one in ids]
    logits = model(input_ids=torch.tensor(rows, dtype=torch.long, device=model.device), use_cache=False).logits
    return [row[: len(one) - 1].float().cpu() for row, one in zip(logits, ids, strict=True)]


def hold(live: Live, folder: Path, device: torch.device, settings: dict[str, Any], kinds: Sequence[str] = ()) -> Held:
    """Hold the live policy against its adapter in stock peft on a stock base, both as the run has them.

    Where there is room, both also compute in fp32 with the same weights. Then nothing is left that rounding could
    explain (`compare.EXACT`), and stock beside itself in the run's dtype says what rounding does to this model: two
    that round in different places may be apart by a few times that (`compare.ROUNDED`, `compare.TIMES`).

    Args:
        folder: of the adapter.
        kinds: of numbers, one on top of the other, of which it is wanted what storing the weights so does.

    Raises:
        RunError: the live policy is another model.
    """
    dtype = settings["compute_dtype"]
    least = UNMEASURED["int8" if settings["quantization"] == "int8" else dtype]
    judged = []
    with stock_adapter(folder, live.recipe, device, settings) as model:
        logits = stock_logits(model, live.ids)
        exact = live.exact is not None and in_float32(model, DTYPES[dtype], device)
        if not is_exact(settings):
            other = stock_logits(model, live.ids) if exact else _side_by_side(model, live.ids)
            rounding = compare(other, live.said.base, logits)
            if all(torch.isfinite(one).all() for one in logits):  # what overflows in stock says nothing
                name = ARITHMETIC.format(dtype)
                judged.append(_judge(live, logits, live.said, name, [rounding], ROUNDED if exact else least))
            logits = other if exact else logits
        said = live.exact if exact and live.exact is not None else live.said
        if exact:
            judged.append(_judge(live, logits, said, EXACT_ARITHMETIC, []))
        explained = _explained(model, live, logits, kinds, DTYPES[dtype]) if exact and kinds else {}
    return Held(judged, explained, logits, said)


def _judge(
    live: Live, logits: Logits, said: Said, arithmetic: str, explained: Sequence[Comparison], least: float = EXACT
) -> dict[str, Any]:
    """Compare what stock says with what the live policy said.

    Raises:
        RunError: they are two models.
    """
    found = compare(logits, said.base, said.policy)
    allowed = bound(found.tokens, explained, least)
    if not found.within(allowed):
        raise RunError(
            f"the live policy is not what stock transformers and peft compute from the same base, {live.recipe.model}, "
            f"and the same adapter: {arithmetic} {found.differ(allowed)}. It was trained and sampled as a model that "
            "nobody else has, so it cannot be exported; nothing was kept. Please report the model's type"
        )
    return found.judged(LIVE, f"stock transformers and peft, {arithmetic}", allowed)


def _explained(
    model: Any, live: Live, logits: Logits, kinds: Sequence[str], dtype: torch.dtype
) -> dict[str, Comparison]:
    """Return by kind what an fp32 model changes when its merged numbers are stored so, on top of the kinds before.

    Args:
        logits: of the model as it is.
        dtype: in which its quantized layers multiply.
    """
    found, stored = {}, StoredModel(model, dtype, model.device)
    for kind in kinds:
        stored.store(kind)
        found[kind] = compare(logits, live.said.base, _side_by_side(model, live.ids))
    return found


def as_live(live: Live, held: Held) -> Reference:
    """Return the live policy as what an export is held against."""
    if live.exact is not None:
        return Reference(live.exact, LIVE, held.explained)
    return Reference(live.said, LIVE, least=max([EXACT, *(one["mean_kl_at_most"] for one in held.judged)]))


def on_original(live: Live, folder: Path, device: torch.device, kinds: Sequence[str]) -> Reference | None:
    """Return the policy's adapter in stock peft on the unquantized base, with fp32 arithmetic.

    Args:
        folder: of the adapter.
        kinds: see `hold`.

    Returns:
        None where neither the device nor the host has room for that base.
    """
    stored = read_tensors(base_folder(live.recipe.model, live.recipe.revision))
    wide = 4 * sum(one.elements for one in stored.values())
    places = [place for place in (device, torch.device("cpu")) if wide <= ROOM * free_bytes(place)]
    if not places:
        return None
    plain = {"quantization": "none", "compute_dtype": "float32"}
    with stock_adapter(folder, live.recipe, places[0], plain) as model:
        policy = stock_logits(model, live.ids)
        with model.disable_adapter():
            base = stock_logits(model, live.ids)
        explained = _explained(model, live, policy, kinds, torch.float32)
    return Reference(Said(policy, base), "the adapter on the unquantized base in stock peft", explained)


def is_stored_as_computed(recipe: Recipe, settings: dict[str, Any]) -> bool:
    """Whether a run's base computes with the very numbers of its files: not quantized, and not cast to fewer bits."""
    if settings["quantization"] != "none":
        return False
    dtype = settings["compute_dtype"]
    stored = read_tensors(base_folder(recipe.model, recipe.revision)).values()
    return dtype == "float32" or {one.dtype for one in stored if one.is_number} == {NAMES[DTYPES[dtype]]}
