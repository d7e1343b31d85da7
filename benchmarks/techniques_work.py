"""The pairs of techniques.py: what is run with and without each technique, all on one loaded base.

A technique is switched by a public setting, or by a module's constant that is replaced while its side runs.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from work import ALPHA, BETA, RANK

from lowmem_rlhf.algorithms.grpo import update
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.engine import attention, fused, logprobs
from lowmem_rlhf.engine.attention import PackedContext
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.decode import fast_decoder
from lowmem_rlhf.engine.decode import products as decoding
from lowmem_rlhf.engine.decode.native import library
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.engine.logprobs import Head, tiled_logprobs
from lowmem_rlhf.engine.packing import pack
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.rollout import wave
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.rollout.sampling import Sampling

TIMES_OF_A_PASS = 1.3  # what a pass with adapters may cost, in passes without
NEARLY_UNIFORM = 50.0  # a temperature at which the model hardly matters for when a completion ends


@dataclass(frozen=True)
class Sizes:
    """The work: completions of prompt ``b`` have lengths from ``longest`` down to a quarter of it, evenly."""

    prompts: tuple[int, ...] = (96, 128)
    generations: int = 8
    longest: int = 64
    micro_batch_tokens: int = 1024
    tile: int = 128
    decoded: int = 40


QUICK = Sizes(prompts=(24, 32), generations=4, longest=16, micro_batch_tokens=160, tile=16, decoded=8)


@dataclass(frozen=True)
class Contest:
    """Ways of doing the same work, and which of them are held against each other.

    Attributes:
        work: what is done.
        sides: a run by the name of the way.
        pairs: (with, without), names of sides.
        bound: the time ratio that the first pair must not exceed; 0: none.
    """

    work: str
    sides: dict[str, Callable[[], object]]
    pairs: Sequence[tuple[str, str]]
    bound: float = 0.0


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``owner.name`` be ``value`` inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def stock_forwards(model: nn.Module) -> Iterator[None]:
    """Let norms and gated layers run their own forward inside the block."""
    taken = {
        module: vars(module).pop("forward")
        for module in model.modules()
        if isinstance(f := vars(module).get("forward"), partial) and f.func.__module__ == fused.__name__
    }
    try:
        yield
    finally:
        for module, forward in taken.items():
            module.forward = forward  # type: ignore[assignment]


@dataclass
class Work:
    """One base and random work for it."""

    base: SharedBase
    model: str
    quantization: str
    compute_dtype: str
    sizes: Sizes
    batch: Rollout = field(init=False)
    lone: Rollout = field(init=False)  # every completion with a prompt of its own
    padded: Rollout = field(init=False)  # and both filled up to the longest

    def __post_init__(self) -> None:
        draw, sizes = random.Random(0), self.sizes
        vocabulary, per_prompt = self.base.head.vocabulary, sizes.generations
        prompts = [[draw.randrange(vocabulary) for _ in range(n)] for n in sizes.prompts]
        lengths = [sizes.longest - g * (sizes.longest * 3 // 4) // (per_prompt - 1) for g in range(per_prompt)]
        texts = [[draw.randrange(vocabulary) for _ in range(n)] for _ in prompts for n in lengths]
        advantages = [(-1.0) ** n for n in range(len(texts))]
        own = [prompt for prompt in prompts for _ in range(per_prompt)]
        self.batch = Rollout(prompts, completions(texts), per_prompt, advantages=advantages)
        self.lone = Rollout(own, completions(texts), 1, advantages=advantages)
        filled = [filled_up(own, max(sizes.prompts)), filled_up(texts, sizes.longest)]
        self.padded = Rollout(filled[0], completions(filled[1]), 1, advantages=advantages)
        self.limits = BatchLimits(1.0, sizes.micro_batch_tokens, sizes.tile)

    def forget(self) -> None:
        """Drop the 16-bit copies of the adapters, so that whatever runs next makes them and is charged for them."""
        for group in self.base.grouped_layers:
            group.set_decode_product(None)

    def score(self, batch: Rollout, role: str = "reference") -> None:
        """Score all completions without gradients."""
        with self.base.role(role):
            completion_logprobs(self.base, batch.groups(range(len(batch.completions))), self.limits)

    def update(self, batch: Rollout, beta: float = BETA, checkpointing: bool = True) -> None:
        """Make the gradient of the whole batch; the reference's log-probs are any numbers."""
        base = self.base
        objective = update.Objective.of(GRPOSettings(beta=beta, loss_type="dapo"), self.sizes.longest)
        reference = {n: torch.zeros(len(c.ids), device=base.device) for n, c in enumerate(batch.completions)}
        base.set_gradient_checkpointing(checkpointing)
        with base.role(POLICY):
            update.backward(base, batch, objective, self.limits, reference if beta else {})
        base.zero_grad(set_to_none=True)

    def decode(self, shared: bool = True, weights: str = "product", natively: bool = True, stop_every: int = 0) -> None:
        """Sample completions.

        Args:
            weights: ``product`` (4-bit, ours where it can be compiled), ``kernel`` (bitsandbytes'), a 16-bit ``copy``,
                or the plain ``layers``.
            natively: tokens go through the layers in C where that is there.
            stop_every: one token in so many ends a completion; 0: none does.
        """
        base, sizes = self.base, self.sizes
        limits = RolloutLimits(len(self.lone.prompts), sizes.micro_batch_tokens, sizes.tile)
        prompts, each = (self.batch.prompts, sizes.generations) if shared else (self.lone.prompts, 1)
        stops = frozenset(range(0, base.head.vocabulary, stop_every)) if stop_every else frozenset()
        sampling = Sampling(temperature=NEARLY_UNIFORM if stop_every else 1.0)
        with ExitStack() as stack:
            if weights == "kernel":
                stack.enter_context(replaced(decoding, "library", lambda: None))
            if not natively:
                stack.enter_context(replaced(fast_decoder, "native_decoder", lambda *given: None))
            stack.enter_context(replaced(type(base), "stop_ids", stops))
            stack.enter_context(base.role(POLICY))
            if weights != "layers":
                stack.enter_context(base.decoding(dequantize=weights == "copy"))
            wave_engine(base).generate(prompts, each, sizes.decoded, sampling, limits, seed=0)


def completions(texts: Sequence[list[int]]) -> list[Completion]:
    """Return token ids as completions."""
    return [Completion(ids, [0.0] * len(ids), False) for ids in texts]


def filled_up(texts: Sequence[list[int]], length: int) -> list[list[int]]:
    """Repeat each text's last token up to this length."""
    return [[*ids, *[ids[-1]] * (length - len(ids))] for ids in texts]


def _packing(work: Work) -> Iterator[Contest]:
    shapes = {"packed": work.batch, "own prompts": work.lone, "padded": work.padded}
    for name, run in (("score", work.score), ("update", work.update)):
        yield Contest(
            f"{name} of {len(work.lone.prompts)} ragged completions",
            {shape: partial(run, batch) for shape, batch in shapes.items()},
            [("packed", "own prompts"), ("packed", "padded")],
        )


def _logprobs(work: Work) -> Iterator[Contest]:
    base = work.base
    targets = torch.tensor([token for c in work.batch.completions for token in c.ids], device=base.device)
    generator = torch.Generator(device="cpu").manual_seed(0)
    hidden = torch.randn(len(targets), base.head.module.in_features, generator=generator)  # type: ignore[call-overload]
    hidden = hidden.to(base.device, base.dtype)

    def tiled(gradient: bool) -> None:
        x = hidden.clone().requires_grad_(gradient)
        logps, _ = tiled_logprobs(x, targets, base.head, 1.0, work.sizes.tile)
        if gradient:
            logps.sum().backward()

    def full(gradient: bool) -> None:
        x = hidden.clone().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            all_logps = base.head.logits(x).float().log_softmax(-1)
            logps = all_logps.gather(-1, targets[:, None]).squeeze(-1)
        with torch.no_grad():
            -(all_logps.exp() * all_logps).sum(-1)
        if gradient:
            logps.sum().backward()

    for gradient in (False, True):
        yield Contest(
            f"log-probs and entropies of {len(targets)} tokens" + (" and their gradient" if gradient else ""),
            {"tiles": partial(tiled, gradient), "all logits": partial(full, gradient)},
            [("tiles", "all logits")],
        )


def _adapters(work: Work) -> Iterator[Contest]:
    """One packed group through the layers: with our adapters, with none, with stock peft's on the same base.

    Nothing but the adapters differs: all take our attention and our fused layers. Where there is a gradient, it goes
    to the embeddings too, so that a pass without adapters has one; activations are kept.
    """
    base = work.base
    base.set_gradient_checkpointing(False)
    packed = pack(work.batch.groups(range(work.sizes.generations)), base.device)
    stock = _stock_peft(work)

    def run(decoder: nn.Module, head: Head, embeddings: nn.Module, gradient: bool) -> None:
        hook = embeddings.register_forward_hook(lambda module, given, out: out.requires_grad_(gradient))
        with torch.set_grad_enabled(gradient):
            hidden = decoder(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                use_cache=False,
                lowmem_context=PackedContext(packed.buckets, base.device),
            ).last_hidden_state[0]
            logps, _ = tiled_logprobs(hidden[packed.predict], packed.targets, head, 1.0, work.sizes.tile)
        if gradient:
            logps.sum().backward()
        hook.remove()
        base.zero_grad(set_to_none=True)
        stock.zero_grad(set_to_none=True)

    def ours(role: str, gradient: bool) -> None:
        with base.role(role):
            run(base.decoder, base.head, base.model.get_input_embeddings(), gradient)

    def peft(gradient: bool) -> None:
        model = stock.get_base_model()
        run(model.get_decoder(), Head(model.get_output_embeddings()), model.get_input_embeddings(), gradient)

    for gradient in (False, True):
        base.set_gradient_checkpointing(False)
        yield Contest(
            f"a pass of {packed.input_ids.numel()} tokens " + ("with gradients" if gradient else "without gradients"),
            {
                "our adapters": partial(ours, POLICY, gradient),
                "no adapters": partial(ours, "reference", gradient),
                "peft's adapters": partial(peft, gradient),
            },
            [("our adapters", "no adapters"), ("our adapters", "peft's adapters"), ("peft's adapters", "no adapters")],
            bound=TIMES_OF_A_PASS,
        )


def _stock_peft(work: Work) -> Any:
    """Return the same base with stock peft's LoRA of the same rank, our attention and our fused layers."""
    model, _ = load_base(work.model, work.quantization, work.compute_dtype, work.base.device)
    model.set_attn_implementation(attention.NAME)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    with torch.device("cpu"):
        stock = get_peft_model(model, config)
    stock.train()
    fused.fuse(stock, work.base.dtype)
    return stock


def _within(run: Callable[[], object], context: Callable[[], Any]) -> None:
    with context():
        run()


def _attention(work: Work) -> Iterator[Contest]:
    if work.base.device.type not in attention.EXPLICIT_ON:
        return
    fused_attention = partial(replaced, attention, "EXPLICIT_ON", set())
    for name, run in (("score", partial(work.score, work.batch)), ("update", partial(work.update, work.batch))):
        sides = {"explicit": run, "SDPA": partial(_within, run, fused_attention)}
        yield Contest(name, sides, [("explicit", "SDPA")])


def _fused_layers(work: Work) -> Iterator[Contest]:
    runs = {
        "score": partial(work.score, work.batch),
        "update": partial(work.update, work.batch),
        "update, activations kept": partial(work.update, work.batch, checkpointing=False),
    }
    for name, run in runs.items():
        sides = {"fused": run, "stock": partial(_within, run, partial(stock_forwards, work.base.model))}
        yield Contest(name, sides, [("fused", "stock")])


def _checkpointing(work: Work) -> Iterator[Contest]:
    sides = {name: partial(work.update, work.batch, checkpointing=name == "on") for name in ("on", "off")}
    yield Contest("update", sides, [("on", "off")])


def _decoding_weights(work: Work) -> Iterator[Contest]:
    kinds = {"16-bit copy": "copy", "bitsandbytes' kernel": "kernel", "plain layers": "layers"}
    pairs = [("16-bit copy", "plain layers"), ("bitsandbytes' kernel", "plain layers")]
    if library() is not None:
        kinds["our product"] = "product"
        pairs += [("our product", other) for other in ("plain layers", "bitsandbytes' kernel", "16-bit copy")]
    sides = {name: partial(work.decode, weights=weights, natively=False) for name, weights in kinds.items()}
    yield Contest(f"rollout of {len(work.lone.prompts)} x {work.sizes.decoded} tokens", sides, pairs)


def _decoding_in_c(work: Work) -> Iterator[Contest]:
    if library() is None:
        return
    yield Contest(
        f"rollout of {len(work.lone.prompts)} x {work.sizes.decoded} tokens",
        {"in C": work.decode, "by torch's operations": partial(work.decode, natively=False)},
        [("in C", "by torch's operations")],
    )


def _head_of_few_rows(work: Work) -> Iterator[Contest]:
    if library() is None:
        return

    def by_torch() -> None:
        with replaced(logprobs, "few_rows", lambda *given: None):
            work.decode()

    yield Contest(
        f"rollout of {len(work.lone.prompts)} x {work.sizes.decoded} tokens",
        {"ours": work.decode, "torch's": by_torch},
        [("ours", "torch's")],
    )


def _decoding_prompts(work: Work) -> Iterator[Contest]:
    yield Contest(
        f"rollout of {len(work.lone.prompts)} x {work.sizes.decoded} tokens",
        {"shared": work.decode, "own prefill": partial(work.decode, shared=False)},
        [("shared", "own prefill")],
    )


def _compaction(work: Work) -> Iterator[Contest]:
    decoded = work.sizes.decoded
    ragged = partial(work.decode, stop_every=max(2, decoded // 4))

    def uncompacted() -> None:
        with replaced(wave, "COMPACT_BELOW", 0):
            ragged()

    yield Contest(
        f"rollout of {len(work.lone.prompts)} ragged completions, at most {decoded} tokens",
        {"on": ragged, "off": uncompacted},
        [("on", "off")],
    )


def _zero_advantages(work: Work) -> Iterator[Contest]:
    """Half of the groups have no advantage, and there is no KL term."""
    batch, half = work.batch, len(work.batch.completions) // 2
    advantages = [*batch.known_advantages[:half], *[0.0] * half]
    some = replace(batch, advantages=advantages)
    skipping = partial(work.update, some, beta=0.0)

    def all_rows() -> None:
        with replaced(update, "rows_to_train", lambda batch, objective: range(2 * half)):
            skipping()

    yield Contest(
        "update, beta 0, half of the groups without advantage",
        {"skipped": skipping, "run": all_rows},
        [("skipped", "run")],
    )


TECHNIQUES: dict[str, Callable[[Work], Iterator[Contest]]] = {
    "shared-prompt packing": _packing,
    "tiled log-probs": _logprobs,
    "16-bit adapters": _adapters,
    "explicit attention scores (CPU)": _attention,
    "fused norms and gated layers": _fused_layers,
    "gradient checkpointing": _checkpointing,
    "weights while decoding": _decoding_weights,
    "decoding in C (CPU)": _decoding_in_c,
    "output head of few rows (CPU)": _head_of_few_rows,
    "shared prompts while decoding": _decoding_prompts,
    "compaction": _compaction,
    "skipping zero advantages": _zero_advantages,
}
