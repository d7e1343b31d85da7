"""Faults injected into the engine: which check sees each of them. The table of docs/engine.md is this one.

Each fault stands for its kind, in a base that passed every trial when it was loaded. The check at load compares with
stock transformers; `sampling/logp_difference` compares the two passes of a run with each other, so that a fault in what
both share is seen by the former alone.
"""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import sampled_difference, tiny_base

from lowmem_rlhf.engine import attention, fused
from lowmem_rlhf.engine.decode import fast_decoder
from lowmem_rlhf.engine.logprobs import Head
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.rollout.cache import SharedPromptCache
from lowmem_rlhf.rollout.stock_check import check
from lowmem_rlhf.training.sampling_check import STOP, WARN, SamplingCheck

DOCS = Path(__file__).parents[2] / "docs" / "engine.md"


def norm_without_its_one(patch, base):
    right = fused._normed
    patch.setattr(fused, "_normed", lambda x, scale, eps: right(x, scale - 1.0, eps))


def rotary_turned_back(patch, base):
    right = fast_decoder._rotated
    patch.setattr(fast_decoder, "_rotated", lambda x, cos, sin: right(x, cos, -sin))


def positions_doubled(patch, base):
    right = base.hidden_states
    patch.setattr(base, "hidden_states", lambda ids, positions, context: right(ids, 2 * positions, context))


def keys_in_the_wrong_slot(patch, base):
    right = SharedPromptCache._store
    patch.setattr(SharedPromptCache, "_store", lambda self, layer, k, v: right(self, layer, k.roll(1, 1), v))


def rows_mixed_up_when_some_leave(patch, base):
    right = SharedPromptCache.keep
    patch.setattr(SharedPromptCache, "keep", lambda self, rows: right(self, rows[::-1]))


def head_scaled(patch, base):
    patch.setattr(base, "head", Head(base.head.module, base.head.scale * 1.5, base.head.softcap))


def head_without_its_cap(patch, base):
    patch.setattr(base, "head", Head(base.head.module, base.head.scale, 0.0))


def mask_that_shows_the_next_token(patch, base):
    right = attention.causal_mask
    patch.setattr(attention, "causal_mask", lambda q, k, window, device: right(q, k, window, device) | _next(q, k))


def _next(queries, keys):
    at = torch.arange(queries)[:, None] + keys - queries + 1
    return torch.arange(keys)[None] == at


def window_left_out_while_decoding(patch, base):
    right = SharedPromptCache.attend
    patch.setattr(SharedPromptCache, "attend", lambda self, *given: right(self, *given[:5], None, given[6]))


def prompts_without_their_mask(patch, base):
    right = SharedPromptCache._mask
    patch.setattr(SharedPromptCache, "_mask", lambda self, *given: torch.zeros_like(right(self, *given)))


# fault -> model, whether the check at load sees it in training passes and in decoding, and what the run's metric does
FAULTS = {
    norm_without_its_one: ("gemma3", True, True, "nothing"),
    positions_doubled: ("llama", True, True, "stops"),
    rotary_turned_back: ("llama", False, True, "stops"),
    keys_in_the_wrong_slot: ("llama", False, True, "stops"),
    rows_mixed_up_when_some_leave: ("llama", False, True, "stops"),
    head_scaled: ("llama", True, True, "nothing"),
    head_without_its_cap: ("gemma2", True, True, "nothing"),
    mask_that_shows_the_next_token: ("llama", True, True, "stops"),
    window_left_out_while_decoding: ("mistral", False, True, "stops"),
    prompts_without_their_mask: ("llama", False, True, "stops"),
}


def what_the_metric_does(difference):
    """Return what a run in fp32 does at a step with this `sampling/logp_difference`."""
    said = []
    try:
        SamplingCheck("none", "float32", 1.0).check(difference, 1, said.append)
    except RunError:
        return "stops"
    return "warns" if said else "nothing"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_sees_a_fault(fault, monkeypatch):
    family, trained, decoded, metric = FAULTS[fault]
    base, _ = tiny_base(family)
    assert check(base).exact and what_the_metric_does(sampled_difference(base)) == "nothing"
    fault(monkeypatch, base)
    found = check(base)
    assert (not found.allows(found.trained), not found.allows(found.decoded)) == (trained, decoded)
    assert not found.exact
    assert what_the_metric_does(sampled_difference(base)) == metric


def test_the_table_in_the_docs_is_this_one():
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (yes|no) \| (yes|no) \| (\w+) \|", DOCS.read_text(), re.MULTILINE)
    yes_no = {True: "yes", False: "no"}
    assert {row[0]: row[1:] for row in rows} == {
        fault.__name__: (yes_no[trained], yes_no[decoded], metric)
        for fault, (_, trained, decoded, metric) in FAULTS.items()
    }


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (("none", "float32"), 2e-4),
        (("nf4", "bfloat16"), 5e-2),
        (("none", "float16"), 6e-3),
        (("int8", "float16"), 2e-2),
    ],
)
def test_the_metric_warns_once_and_stops_beyond_its_bounds(precision, expected, temperature):
    said = []
    looks = SamplingCheck(*precision, temperature)
    unit = expected / temperature
    looks.check(None, 1, said.append)
    looks.check(0.99 * WARN * unit, 1, said.append)
    assert not said
    looks.check(1.01 * WARN * unit, 2, said.append)
    looks.check(0.99 * STOP * unit, 3, said.append)
    assert len(said) == 1 and said[0].startswith("step 2") and precision[1] in said[0]
    for beyond in (1.01 * STOP * unit, float("nan")):
        with pytest.raises(RunError, match="not the one that trains"):
            looks.check(beyond, 4, said.append)
