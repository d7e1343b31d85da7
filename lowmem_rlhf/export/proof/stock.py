"""The outputs of stock transformers with the adapter in stock peft, which the live policy and every export must match.

None of our own forward passes, fused layers or adapters takes part, so a fault in one of them shows. The models are
loaded one after another, and only the logits of a few hundred tokens are kept of each.
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
from lowmem_rlhf.export.proof.outputs import ROOM, Logits, PolicyOutputs, SequenceLogits, in_float32, is_exact
from lowmem_rlhf.export.proof.storage import StoredModel
from lowmem_rlhf.export.shards import NAMES, read_tensors
from lowmem_rlhf.export.source import base_folder
from lowmem_rlhf.hardware.memory import free_bytes, release
from lowmem_rlhf.recipe.schema import Recipe

LIVE = "the live policy"
EXACT_ARITHMETIC, ARITHMETIC = "with float32 arithmetic", "with {} arithmetic"


@dataclass(frozen=True)
class Reference:
    """The model that an export must reproduce.

    Attributes:
        logits: of the policy and of its base without the adapter.
        name: in messages.
        explained: what storing the weights as a kind of numbers (on top of the kinds before it) changes, by kind.
        least: mean KL that is allowed however the export is stored.
    """

    logits: Logits
    name: str
    explained: dict[str, Comparison] = field(default_factory=dict)
    least: float = EXACT

    def bound(self, tokens: int, kind: str, arithmetic: str = "float32") -> Bound:
        """Return how far off a correct export may be that is stored as this kind and computes in this dtype."""
        least = max(self.least, EXACT if arithmetic == "float32" else UNMEASURED[arithmetic])
        if kind == "float32":
            return bound(tokens, least=least)
        if kind not in self.explained:
            return bound(tokens, least=max(least, UNMEASURED[kind]))
        return bound(tokens, [self.explained[kind]], least, STORED_TIMES if kind in DTYPES else TIMES)


@dataclass(frozen=True)
class StockComparison:
    """The live policy compared with stock.

    Attributes:
        verdicts: the comparisons and their bounds, for export.json.
        explained: see `Reference`.
        logits: stock's, with the arithmetic of ``live_logits``.
        live_logits: the live policy's with the same arithmetic.
    """

    verdicts: list[dict[str, Any]]
    explained: dict[str, Comparison]
    logits: SequenceLogits
    live_logits: Logits


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
    if difference := differing_tensors(stored, get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise RunError(f"the adapter does not fit what peft makes of it: its files {difference}; nothing was kept")
    yield model
    del base, model
    release(device)


@torch.no_grad()
def stock_logits(model: Any, ids: Sequence[Sequence[int]]) -> SequenceLogits:
    """Return for each sequence of L tokens a stock model's logits (L - 1, V), fp32 on the CPU."""
    inputs = (torch.tensor([one], dtype=torch.long, device=model.device) for one in ids)
    return [model(input_ids=one, use_cache=False).logits[0, :-1].float().cpu() for one in inputs]


@torch.no_grad()
def _side_by_side(model: Any, ids: Sequence[Sequence[int]]) -> SequenceLogits:
    """Return `stock_logits` with all sequences in one pass, padded at their end.

    Sums come in another order, and quantized layers are dequantized once. Where the lengths differ much each sequence
    goes alone, beside a copy of itself.
    """
    longest = max(map(len, ids))
    if len(ids) * longest > 2 * sum(map(len, ids)):
        return [logits for one in ids for logits in _side_by_side(model, [one, one])[:1]]
    rows = [[*one, *([one[-1]] * (longest - len(one)))] for one in ids]
    logits = model(input_ids=torch.tensor(rows, dtype=torch.long, device=model.device), use_cache=False).logits
    return [row[: len(one) - 1].float().cpu() for row, one in zip(logits, ids, strict=True)]


def compare_with_stock(
    live: PolicyOutputs, folder: Path, device: torch.device, settings: dict[str, Any], kinds: Sequence[str] = ()
) -> StockComparison:
    """Compare the live policy with its adapter in stock peft on a stock base, both in the run's precision.

    Where there is room, both also compute in fp32 with the same weights. Rounding then explains no difference
    (`compare.EXACT`), and stock in fp32 beside stock in the run's dtype shows what rounding does to this model: two
    models that round in different places may differ by a few times that (`compare.ROUNDED`, `compare.TIMES`).

    Args:
        folder: of the adapter.
        kinds: of numbers, each stored on top of those before it, whose effect on the predictions is wanted.

    Raises:
        RunError: the live policy is another model.
    """
    dtype = settings["compute_dtype"]
    least = UNMEASURED["int8" if settings["quantization"] == "int8" else dtype]
    verdicts = []
    with stock_adapter(folder, live.recipe, device, settings) as model:
        logits = stock_logits(model, live.ids)
        exact = live.exact_logits is not None and in_float32(model, DTYPES[dtype], device)
        if not is_exact(settings):
            other = stock_logits(model, live.ids) if exact else _side_by_side(model, live.ids)
            rounding = compare(other, live.logits.base, logits)
            if all(torch.isfinite(one).all() for one in logits):  # what overflows in stock says nothing
                name = ARITHMETIC.format(dtype)
                verdicts.append(_judge(live, logits, live.logits, name, [rounding], ROUNDED if exact else least))
            logits = other if exact else logits
        live_logits = live.exact_logits if exact and live.exact_logits is not None else live.logits
        if exact:
            verdicts.append(_judge(live, logits, live_logits, EXACT_ARITHMETIC, []))
        explained = _explained(model, live, logits, kinds, DTYPES[dtype]) if exact and kinds else {}
    return StockComparison(verdicts, explained, logits, live_logits)


def _judge(
    live: PolicyOutputs,
    logits: SequenceLogits,
    live_logits: Logits,
    arithmetic: str,
    explained: Sequence[Comparison],
    least: float = EXACT,
) -> dict[str, Any]:
    """Compare stock's logits with the live policy's, and return the verdict.

    Raises:
        RunError: they are two models.
    """
    comparison = compare(logits, live_logits.base, live_logits.policy)
    allowed = bound(comparison.tokens, explained, least)
    if not comparison.within(allowed):
        raise RunError(
            f"the live policy is not what stock transformers and peft compute from the same base, {live.recipe.model}, "
            f"and the same adapter: {arithmetic} {comparison.differ(allowed)}. It was trained and sampled as a model "
            "that nobody else has, so it cannot be exported; nothing was kept. Please report the model's type"
        )
    return comparison.verdict(LIVE, f"stock transformers and peft, {arithmetic}", allowed)


def _explained(
    model: Any, live: PolicyOutputs, logits: SequenceLogits, kinds: Sequence[str], dtype: torch.dtype
) -> dict[str, Comparison]:
    """Return how an fp32 model's predictions change when its merged numbers are stored as each kind, by kind.

    Each kind is stored on top of those before it.

    Args:
        logits: of the model as it is.
        dtype: in which its quantized layers multiply.
    """
    changes, stored = {}, StoredModel(model, dtype, model.device)
    for kind in kinds:
        stored.store(kind)
        changes[kind] = compare(logits, live.logits.base, _side_by_side(model, live.ids))
    return changes


def live_reference(live: PolicyOutputs, stock: StockComparison) -> Reference:
    """Return the live policy as the reference of an export onto the run's own weights."""
    if live.exact_logits is not None:
        return Reference(live.exact_logits, LIVE, stock.explained)
    return Reference(live.logits, LIVE, least=max([EXACT, *(one["mean_kl_at_most"] for one in stock.verdicts)]))


def original_reference(
    live: PolicyOutputs, folder: Path, device: torch.device, kinds: Sequence[str]
) -> Reference | None:
    """Return the adapter in stock peft on the unquantized base, with fp32 arithmetic, as an export's reference.

    Args:
        folder: of the adapter.
        kinds: see `compare_with_stock`.

    Returns:
        None where neither the device nor the host has room for the base.
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
    return Reference(Logits(policy, base), "the adapter on the unquantized base in stock peft", explained)


def is_stored_as_computed(recipe: Recipe, settings: dict[str, Any]) -> bool:
    """Whether a run's base computes with exactly the numbers in its files: neither quantized nor cast to fewer bits."""
    if settings["quantization"] != "none":
        return False
    dtype = settings["compute_dtype"]
    stored = read_tensors(base_folder(recipe.model, recipe.revision)).values()
    return dtype == "float32" or {one.dtype for one in stored if one.is_number} == {NAMES[DTYPES[dtype]]}
