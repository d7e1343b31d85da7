"""Decoding with graphs of the device, without them, and by waves: tokens a second on one base, with equal tokens."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lowmem_rlhf.bench.our_step import EndlessBase
from lowmem_rlhf.bench.work import ALPHA, RANK, Work
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.hardware.memory import clock
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.rollout.continuous import ContinuousEngine
from lowmem_rlhf.rollout.engine import Engine, wave_engine
from lowmem_rlhf.rollout.graphs import can_capture
from lowmem_rlhf.rollout.sampling import Sampling

PROMPT = 64  # tokens
GROUP = 8  # completions of a prompt, at most
WARM_UP = 4  # tokens


def decoding(work: Work, progress: ProgressCallback) -> dict[str, Any]:
    """Measure decoding of the 16-bit base for each number of rows.

    Returns:
        ``rows``: by their number what `_measured` returns; ``note``: why nothing was captured, or an empty text.
    """
    device = torch.device(work.device)
    base = EndlessBase.load(work.model, device, "none", work.compute_dtype, r=RANK, lora_alpha=ALPHA)
    found, note = {}, "" if can_capture(device) else f"torch has no graphs for {device.type}"
    progress(1, len(work.sizes.rows) + 1)
    for done, rows in enumerate(work.sizes.rows, 2):
        found[str(rows)], why = _measured(base, rows, work, not note)
        note = note or why
        progress(done, len(work.sizes.rows) + 1)
    return {"rows": found, "decoded_tokens": work.sizes.decoded_tokens, "note": note}


def _measured(base: SharedBase, rows: int, work: Work, capture: bool) -> tuple[dict[str, Any], str]:
    """Return tokens a second by way of decoding, and the share of completions that equal those without graphs.

    Beside that a sentence where passes could not be captured; ``graphs`` is None then.
    """
    each = min(rows, GROUP)
    draw = random.Random(0)
    prompts = [[draw.randrange(base.rows) for _ in range(PROMPT)] for _ in range(-(-rows // each))]
    limits = RolloutLimits(rows, work.sizes.micro_batch_tokens, work.sizes.tile, keep_graphs=True)

    def sample(engine: Engine, length: int) -> list[list[int]]:
        groups = engine.generate(prompts, each, length, Sampling(), limits, seed=0)
        return [completion.ids for group in groups for completion in group]

    ways: dict[str, Callable[[], Any]] = {
        "without_graphs": lambda: ContinuousEngine(base, capture=False),
        "waves": lambda: wave_engine(base),
        **({"graphs": lambda: ContinuousEngine(base)} if capture else {}),
    }
    speeds: dict[str, Any] = {"graphs": None}
    tokens: dict[str, list[list[int]]] = {}
    first, note = None, ""
    with base.role("policy"):
        for way, make in ways.items():
            engine = make()
            began = clock(base.device)
            sample(engine, work.sizes.decoded_tokens if way == "graphs" else WARM_UP)  # captures every shape
            middle = clock(base.device)
            tokens[way] = sample(engine, work.sizes.decoded_tokens)
            seconds = clock(base.device) - middle
            speeds[way] = len(tokens[way]) * work.sizes.decoded_tokens / seconds
            if way == "graphs":
                first, note = middle - began - seconds, engine.note
            if release := getattr(engine, "release", None):
                release()
    if note:
        speeds["graphs"] = None
    equal = {way: _share(tokens[way], tokens["without_graphs"]) for way in ways if way != "without_graphs"}
    found = {"tokens_per_second": speeds, "equal_completions": equal, "capture_seconds": first}
    if speeds["graphs"]:
        found["ratio"] = {way: speeds["graphs"] / speeds[way] for way in ("without_graphs", "waves")}
    return found, note


def _share(some: Sequence[list[int]], others: Sequence[list[int]]) -> float:
    return sum(a == b for a, b in zip(some, others, strict=True)) / len(others)
