"""The check at load: log-probs as they are trained on and as they are sampled, held against stock transformers.

Two prompts with completions of unequal lengths go through the packed (or padded) pass, are decoded token by token with
the tokens given, and go through the same weights with the stock forwards, the stock attention and peft's adapter
layers, each alone. The adapter is not zero. What may differ is what rounding explains: how far stock is from itself in
this dtype, alone against batched and with its layers' results nudged by a rounding.

Shapes: R rows, T completion tokens of all rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from lowmem_rlhf.architecture.families import family_of
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.logprobs import tiled_logprobs
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.engine.stock import stock_forwards
from lowmem_rlhf.engine.trial import nudged_layers
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.rollout.engine import wave_engine

TESTED_WITH = "5.23.0"  # the release of transformers that the tests hold tested families against
MEAN_NOISE, MOST_NOISE = 4.0, 8.0  # times stock's distance from itself, of the mean (or median) and of one token
INT8_FACTOR = 3.0  # LLM.int8 rounds by the largest number of a row, and picks outliers from the whole batch
NUDGES = 2  # draws, the larger of which counts
FLOOR = 1e-3  # nats: nothing that differs by less is of another form
LOGIT_ROUNDINGS = 0.25  # of the largest logit: on average; logits are rounded to the compute dtype
DELTA = 0.1  # of a layer's input that the adapter of the check adds to its output

PROMPTS = ("The capital of France is", "Question: Anna has 12 apples and gives 5 away. How many are left? Answer:")
COMPLETIONS = ((" Paris, a city on the river Seine", " Lyon"), (" She has 7 apples left.", " 12 - 5 = 7"))
MOST_TOKENS = 16  # of a text
LENGTHS = ((5, 9), ((7, 2), (4, 1)))  # of prompts and completions where there is no tokenizer

LogProbs = torch.Tensor  # (T,) fp32 on the CPU


@dataclass(frozen=True)
class Distance:
    """How far log-probs are apart, in nats a token; ``upper`` is what a quarter of the tokens are beyond."""

    mean: float
    median: float
    upper: float
    largest: float

    @classmethod
    def between(cls, one: LogProbs, other: LogProbs) -> "Distance":
        """Return the distance of log-probs (T,); what is not finite is infinitely far."""
        off = (one - other).abs().nan_to_num(nan=float("inf"))
        return cls(
            float(off.mean()), float(off.median()), float(off.quantile(0.75, interpolation="lower")), float(off.max())
        )

    def to_dict(self) -> dict[str, float]:
        """Return plain values."""
        return {"mean": self.mean, "median": self.median, "upper_quartile": self.upper, "largest": self.largest}


@dataclass(frozen=True)
class StockCheck:
    """What the check found.

    Attributes:
        way: ``packed`` or ``padded``.
        tokens: T.
        trained, decoded: the distance to stock of the training pass and of decoding.
        noise: stock's distance from itself.
        slack: nats that the rounding of logits explains.
        factor: of the bounds; larger where activations are rounded to 8 bits, which a rounding before may tip.
        experts: tokens are routed in 16 bits: a few that meet another expert may differ by much, so that the median
            counts and the upper quartile.
        said: one line for the user.
    """

    way: str
    tokens: int
    trained: Distance
    decoded: Distance
    noise: Distance
    slack: float
    factor: float
    experts: bool

    def allows(self, distance: Distance) -> bool:
        """Say whether rounding explains a distance."""
        noise, most = self.factor * MEAN_NOISE, self.factor * MOST_NOISE
        if not distance.median <= noise * self.noise.median + self.slack:
            return False
        if self.experts:
            return distance.upper <= most * self.noise.upper + 4 * self.slack
        mean, largest = noise * self.noise.mean + self.slack, most * self.noise.largest + 8 * self.slack
        return distance.mean <= mean and distance.largest <= largest

    @property
    def exact(self) -> bool:
        """Whether rounding explains both distances."""
        return self.allows(self.trained) and self.allows(self.decoded)

    @property
    def said(self) -> str:
        """One line for the user."""
        return (
            f"check: log-probs of {self.tokens} tokens are those of stock transformers to {self.trained.mean:.1g} nats "
            f"a token as trained ({self.way}) and {self.decoded.mean:.1g} as sampled; stock's own rounding is "
            f"{self.noise.mean:.1g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for plan.json."""
        return {
            "transformers": transformers.__version__,
            "way": self.way,
            "tokens": self.tokens,
            "trained": self.trained.to_dict(),
            "decoded": self.decoded.to_dict(),
            "stock_with_itself": self.noise.to_dict(),
            "exact": self.exact,
            "said": self.said,
        }


def is_tested(model: Any) -> bool:
    """Say whether the tests hold a model's class against stock: one of the tested release, and not of its own code."""
    own = type(model).__module__.startswith("transformers.models.")
    return own and family_of(model.config.model_type).tested and transformers.__version__ == TESTED_WITH


def checked(base: SharedBase, dequantize: bool = False) -> StockCheck:
    """Check a base that was just loaded; one that is packed and differs is padded and checked again.

    Args:
        dequantize: how NF4 weights are held while decoding (see `SharedBase.decoding`).

    Raises:
        UserError: its log-probs are not those of stock transformers.
    """
    result = check(base, dequantize)
    if not result.exact and base.packable:
        base.pad("packed, its log-probs are not those of stock transformers")
        result = check(base, dequantize)
    if not result.exact:
        distance, what = (
            (result.decoded, "as sampled") if result.allows(result.trained) else (result.trained, "as trained on")
        )
        raise UserError(
            f"model {base.model_id!r} ({type(base.model).__name__}) is refused: here its log-probs, {what}, differ "
            f"from stock transformers' by {distance.mean:.2g} nats a token (at most {distance.largest:.2g}), and "
            f"rounding in {str(base.dtype).removeprefix('torch.')} explains {result.noise.mean:.2g}; take another model"
            + ("" if base.dtype == torch.float32 else ", or try hardware.compute_dtype=float32")
        )
    return result


@torch.no_grad()
def check(base: SharedBase, dequantize: bool = False) -> StockCheck:
    """Measure how far the base's log-probs are from stock's, in the policy's role with an adapter that is not zero."""
    groups = _groups(base)
    with _filled_adapter(base), base.role(POLICY):
        trained, decoded = _trained(base, groups), _decoded(base, groups, dequantize)
        with stock_forwards(base) as model:
            alone, logits = _alone(model, groups)
            noise = _self_noise(model, base.dtype, groups, alone)
    eps = torch.finfo(base.dtype).eps
    return StockCheck(
        way="packed" if base.packable else "padded",
        tokens=alone.numel(),
        trained=Distance.between(trained, alone),
        decoded=Distance.between(decoded, alone),
        noise=noise,
        slack=max(FLOOR, LOGIT_ROUNDINGS * eps * logits),
        factor=INT8_FACTOR if getattr(base.model, "is_loaded_in_8bit", False) else 1.0,
        experts=base.dtype != torch.float32 and any("expert" in name for name, _ in base.model.named_parameters()),
    )


def _groups(base: SharedBase) -> list[Group]:
    """Return two prompts with two completions each: texts where there is a tokenizer, else tokens by chance."""
    if callable(base.tokenizer):
        embedding: Any = base.model.get_input_embeddings()
        vocabulary = embedding.weight.shape[0]

        def ids(text: str) -> list[int]:
            return [min(i, vocabulary - 1) for i in base.tokenizer(text, add_special_tokens=False)["input_ids"]]

        texts = [(ids(p), [ids(c) for c in own]) for p, own in zip(PROMPTS, COMPLETIONS, strict=True)]
    else:
        generator = torch.Generator(device="cpu").manual_seed(0)
        vocabulary = min(int(base.model.config.get_text_config().vocab_size), base.head.vocabulary)

        def drawn(n: int) -> list[int]:
            return torch.randint(vocabulary, (n,), generator=generator, dtype=torch.long, device="cpu").tolist()

        texts = [(drawn(p), [drawn(c) for c in own]) for p, own in zip(*LENGTHS, strict=True)]
    return [
        Group(prompt[:MOST_TOKENS] or [0], [(c or [0])[:MOST_TOKENS] for c in own], [2 * i, 2 * i + 1])
        for i, (prompt, own) in enumerate(texts)
    ]


@contextmanager
def _filled_adapter(base: SharedBase) -> Iterator[None]:
    """Let the policy's adapter add to every layer's output; it is what it was afterwards.

    A starts at random and B at zero (arXiv 2106.09685), so B is filled, unless training has done so.
    """
    zero = [layer for layer in base.adapter_layers() if POLICY in layer.lora_B and not layer.masters(POLICY)[1].any()]
    generator = torch.Generator(device="cpu").manual_seed(0)
    try:
        for layer in zero:
            a, b = layer.masters(POLICY)
            noise = torch.randn(b.shape, generator=generator, dtype=torch.float32, device="cpu").to(b)
            b.copy_(noise * DELTA / (layer.scaling[POLICY] * float(a.square().sum().sqrt()) + 1e-9))
        base.adapters_changed()
        yield
    finally:
        for layer in zero:
            layer.masters(POLICY)[1].zero_()
        base.adapters_changed()


def _trained(base: SharedBase, groups: Sequence[Group]) -> LogProbs:
    """Return the log-probs (T,) of the completions as a training pass computes them."""
    batch = base.layout.lay_out(groups, base.device)
    logps, _ = tiled_logprobs(
        base.states(batch).index_select(0, batch.predict), batch.targets, base.head, 1.0, 64, entropy="none"
    )
    by_row = dict(zip(batch.rows, logps.split(batch.lengths), strict=True))
    return torch.cat([by_row[row] for row in sorted(by_row)]).cpu()


def _decoded(base: SharedBase, groups: Sequence[Group], dequantize: bool) -> LogProbs:
    """Return the log-probs (T,) of the completions as decoding computes them, token by token."""
    completions = [c for group in groups for c in group.completions]
    row_prompt = [number for number, group in enumerate(groups) for _ in group.completions]
    by_row: list[list[torch.Tensor]] = [[] for _ in completions]
    longest = max(map(len, completions))
    with base.decoding(dequantize):
        state, hidden = wave_engine(base).start(
            [group.prompt for group in groups], row_prompt, longest - 1, 4 * MOST_TOKENS
        )
        if hidden.shape[0] != len(completions):
            hidden = hidden[torch.tensor(row_prompt, dtype=torch.long, device=base.device)]
        live = list(range(len(completions)))
        for t in range(longest):
            tokens = torch.tensor([completions[row][t] for row in live], dtype=torch.long, device=base.device)
            logps = base.head.logits(hidden).log_softmax(-1, dtype=torch.float32).gather(-1, tokens[:, None])
            for row, logp in zip(live, logps[:, 0], strict=True):
                by_row[row].append(logp)
            stay = [place for place, row in enumerate(live) if len(completions[row]) > t + 1]
            if not stay:
                break
            if len(stay) < len(live):
                state.keep(stay)
                tokens, live = tokens[torch.tensor(stay, dtype=torch.long, device=base.device)], [live[i] for i in stay]
            hidden = state.next_states(base, tokens)
    return torch.stack([logp for row in by_row for logp in row]).cpu()


def _rows(groups: Sequence[Group]) -> list[tuple[list[int], int]]:
    """Return the text of each row, and where its completion begins."""
    return [([*group.prompt, *c], len(group.prompt)) for group in groups for c in group.completions]


def _alone(model: Any, groups: Sequence[Group]) -> tuple[LogProbs, float]:
    """Return the log-probs (T,) of a stock model that runs each row alone, and its largest logit."""
    logps, largest = [], 0.0
    for text, begins in _rows(groups):
        ids = torch.tensor([text], dtype=torch.long, device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, begins - 1 : -1].float()
        logps.append(logits.log_softmax(-1).gather(-1, ids[0, begins:, None])[:, 0])
        largest = max(largest, float(logits.abs().max()))
    return torch.cat(logps).cpu(), largest


def _batched(model: Any, groups: Sequence[Group]) -> LogProbs:
    """Return the log-probs (T,) of a stock model that runs all rows at once, padded on the right and masked."""
    rows = _rows(groups)
    longest = max(len(text) for text, _ in rows)
    padded = [text + text[-1:] * (longest - len(text)) for text, _ in rows]
    seen = [[1] * len(text) + [0] * (longest - len(text)) for text, _ in rows]
    ids, mask = (torch.tensor(x, dtype=torch.long, device=model.device) for x in (padded, seen))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logps = []
    for row, (text, begins) in enumerate(rows):
        own = logits[row, begins - 1 : len(text) - 1].float().log_softmax(-1)
        logps.append(own.gather(-1, ids[row, begins : len(text), None])[:, 0])
    return torch.cat(logps).cpu()


def _self_noise(model: Any, dtype: torch.dtype, groups: Sequence[Group], alone: LogProbs) -> Distance:
    """Return how far a stock model is from itself: batched, and with every layer's result moved by a rounding."""
    batched = _batched(model, groups)
    distances = [Distance.between(batched, alone)]
    for seed in range(NUDGES):
        with nudged_layers(model, dtype, seed):
            distances.append(Distance.between(_batched(model, groups), batched))
    return Distance(*(max(pair) for pair in zip(*(vars(one).values() for one in distances), strict=True)))
