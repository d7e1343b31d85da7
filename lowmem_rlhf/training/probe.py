"""The probe: each phase once at the largest planned shape, before the first step; what it took against the plan.

Nothing is learned and no optimizer step is taken. On a device that counts, the peak is the allocator's; elsewhere live
tensors are counted. The optimizer's state is not there yet and is left out of both sides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.host_embedding import embeddings_to_host
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.logprobs import Entropy
from lowmem_rlhf.engine.packing import ATTENDED_PER_TOKEN, Group
from lowmem_rlhf.engine.passes import packed_logprobs, packed_outputs, with_bootstrap_position
from lowmem_rlhf.engine.roles import CRITIC, POLICY, REFERENCE
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.hardware.memory import device_counter, is_out_of_memory, release
from lowmem_rlhf.planning.inputs import MARGIN
from lowmem_rlhf.planning.memory.phases import phases
from lowmem_rlhf.planning.memory.resident import Components
from lowmem_rlhf.planning.plan import Plan, make_plan
from lowmem_rlhf.planning.shapes import prompts_at_once, rollout_rows, row_tokens, samples_completions
from lowmem_rlhf.recipe.field_roles import fields_with
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import HardwareConfig
from lowmem_rlhf.recipe.server import SERVERS
from lowmem_rlhf.rollout.cache import SharedPromptCache
from lowmem_rlhf.rollout.continuous import ContinuousEngine
from lowmem_rlhf.rollout.draws import Draws
from lowmem_rlhf.rollout.engine import engine_for, wave_engine
from lowmem_rlhf.rollout.sampling import Sampling

TIGHTEN, RELAX = 1 + MARGIN, 0.90  # of what was planned: beyond these the plan is made once more
FAILED = 1.25  # taken for the ratio where a phase ran out of memory
FIXED = fields_with(HardwareConfig, fixed_once_loaded=True)


@dataclass(frozen=True)
class Probed:
    """What the probe found.

    Attributes:
        phases: for each phase ``predicted_bytes`` and ``measured_bytes`` (None: memory ran out).
        ratio: what was measured over what was predicted (`ratio_of`).
        said: one line for the user.
    """

    phases: dict[str, dict[str, int | None]]
    ratio: float
    said: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for plan.json."""
        return {"phases": self.phases, "ratio": self.ratio, "said": self.said}


def probe(base: SharedBase, recipe: Recipe, plan: Plan) -> tuple[Plan, Probed]:
    """Measure every phase and return the plan, tightened or relaxed once where it was wrong, and what was found.

    Args:
        base: with all roles that the recipe needs.
    """
    settings = plan.settings
    base.set_gradient_checkpointing(settings.gradient_checkpointing, settings.offload_checkpoints)
    found: dict[str, dict[str, int | None]] = {}
    planned, others = _planned_phases(base, recipe, plan), _others(base)
    for name, work in _phases(base, recipe, plan).items():
        components = planned[name]
        # neither is there yet: moments, and graphs that a rollout leaves to the next
        predicted = sum(components.values()) - components["optimizer_state"] - components.get("graphs", 0)
        found[name] = {"predicted_bytes": predicted, "measured_bytes": _measured(base, work, others)}
    ratio = ratio_of(found)
    if RELAX <= ratio <= TIGHTEN:
        said = f"probe: the largest phase took {ratio:.2f} of what was planned; it stays"
        return _measured_verdict(plan, plan, found), Probed(found, ratio, said)
    made, probed = _again(base, recipe, plan, found, ratio)
    return _measured_verdict(made, plan, found), probed


def _measured_verdict(made: Plan, plan: Plan, found: dict[str, dict[str, int | None]]) -> Plan:
    """Return the plan that goes on, which fits where all phases of an unknown one did, with the optimizer's state."""
    if plan.verdict != "unknown":
        return made
    measured = [one["measured_bytes"] for one in found.values()]
    state = max(parts["optimizer_state"] for parts in plan.memory["phases"].values() if "optimizer_state" in parts)
    known = all(size is not None and size + state <= plan.memory["budget_bytes"] for size in measured)
    return replace(made, verdict="yes" if known else "unknown")


def ratio_of(found: dict[str, dict[str, int | None]]) -> float:
    """Return the largest measured phase over the largest planned one; where that is low, the worst phase's own ratio.

    What a phase takes beyond its plan does no harm while another one needs more. But a plan grows in all its phases.
    """
    pairs = [(one["measured_bytes"], one["predicted_bytes"]) for one in found.values()]
    own = [FAILED if measured is None or not planned else measured / planned for measured, planned in pairs]
    if any(measured is None for measured, _ in pairs):
        return max(own)
    whole = max(measured or 0 for measured, _ in pairs) / max(planned or 0 for _, planned in pairs)
    return whole if whole >= RELAX else min(1.0, max(own))


def _planned_phases(base: SharedBase, recipe: Recipe, plan: Plan) -> dict[str, Components]:
    """Return the predicted bytes of each phase for the very micro-batches that are probed.

    Whole groups of full length may leave room in a micro-batch, which the plan takes to be filled.
    """
    settings = plan.settings

    def size(tokens: int) -> int:
        """The micro-batch into which exactly these groups go, by their tokens and by the keys that they attend to."""
        groups = _largest(base, recipe, tokens)
        attended = sum(group.attended for group in groups)
        return max(sum(group.tokens for group in groups), -(-attended // ATTENDED_PER_TOKEN))

    sizes: dict[str, Any] = {key: size(getattr(settings, key)) for key in ("micro_batch_tokens", "score_batch_tokens")}
    dims = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
    return phases(dims, recipe, replace(settings, **sizes), plan.device)


def _again(
    base: SharedBase, recipe: Recipe, plan: Plan, found: dict[str, dict[str, int | None]], ratio: float
) -> tuple[Plan, Probed]:
    """Plan once more, as if the device had as much less memory as the phases took more."""
    settings = plan.settings
    # embeddings on the device may still leave it
    fixed = (*FIXED, "rollout_weights")  # weights are joined when they are loaded
    kept = {key: getattr(settings, key) for key in fixed if key != "offload_embeddings" or settings.offload_embeddings}
    shape = {key: settings.lora[key] for key in ("r", "lora_alpha")}
    pinned = recipe.model_copy(
        update={
            "hardware": recipe.hardware.model_copy(update=kept),
            "lora": recipe.lora.model_copy(update=shape),
        }
    )
    free = plan.device.free_bytes
    made = make_plan(pinned, replace(plan.device, free_bytes=int(free / ratio)), plan.profile)
    reasons = {**made.reasons, **{key: plan.reasons[key] for key in (*fixed, "lora")}}
    if made.settings.offload_embeddings and not settings.offload_embeddings:
        embeddings_to_host(base.model)
    changed = [
        f"{key} {getattr(settings, key)} -> {getattr(made.settings, key)}"
        for key in (
            "offload_embeddings",
            "gradient_checkpointing",
            "micro_batch_tokens",
            "score_batch_tokens",
            "rollout_batch_size",
            "keep_graphs",
        )
        if getattr(settings, key) != getattr(made.settings, key)
    ]
    word = "tightened" if ratio > 1 else "relaxed"
    what = ", ".join(changed) or "no setting changes"
    said = f"probe: the largest phase took {ratio:.2f} of what was planned; the plan is {word} once: {what}"
    memory = {**made.memory, "budget_bytes": plan.memory["budget_bytes"]}
    return replace(made, device=plan.device, reasons=reasons, memory=memory), Probed(found, ratio, said)


def _others(base: SharedBase) -> int:
    """Return the bytes on the device that are there for others (learned rewards) before the first phase."""
    release(base.device)
    now = device_counter(base.device, "memory_allocated")
    return max(0, (int(now(base.device)) if now else LiveBytes().current) - held_bytes(base))


def _measured(base: SharedBase, work: Callable[[], None], others: int) -> int | None:
    """Return the peak bytes of a phase without those of others; None: memory ran out."""
    release(base.device)
    reset, read = (device_counter(base.device, name) for name in ("reset_peak_memory_stats", "max_memory_reserved"))
    try:
        if reset and read:
            reset(base.device)
            work()
            return int(read(base.device)) - others
        counter = LiveBytes()
        with counter:
            work()
        return counter.peak - others
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        for parameter in base.trainable().values():
            parameter.grad = None


def held_bytes(base: SharedBase) -> int:
    """Return the bytes of the base's own tensors on its device: weights, what goes with quantized ones, adapters."""
    storages: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == base.device.type:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    for tensor in [*base.parameters(), *base.buffers()]:
        add(tensor.data)
        state = getattr(tensor, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            for value in vars(one).values() if one is not None else ():
                add(value)
        for name in ("CB", "SCB"):
            add(getattr(tensor, name, None))
    for module in base.modules():  # LLM.int8 moves its numbers here with the first call
        for name in ("CB", "SCB"):
            add(getattr(getattr(module, "state", None), name, None))
    return sum(storages.values())


def _phases(base: SharedBase, recipe: Recipe, plan: Plan) -> dict[str, Callable[[], None]]:
    settings = plan.settings
    found: dict[str, Callable[[], None]] = {}
    if samples_completions(recipe) and recipe.generation.engine not in SERVERS:
        found["rollout"] = lambda: _rollout(base, recipe, plan)
    language = recipe.spec.output == "text"
    role = REFERENCE if recipe.spec.reference else POLICY
    found["scoring"] = lambda: _pass(base, _largest(base, recipe, settings.score_batch_tokens), role, plan, language)
    found["update"] = lambda: _update(base, recipe, plan, language)
    return found


def _ids(base: SharedBase, count: int) -> list[int]:
    return [token % base.head.vocabulary for token in range(count)]


def _largest(base: SharedBase, recipe: Recipe, tokens: int) -> list[Group]:
    """Return one micro-batch of at most so many tokens with prompts and completions of full length."""
    lengths, groups = recipe.generation, recipe.training.prompts_per_step
    if recipe.spec.rows in ("completions", "answers"):
        whole = [Group(_ids(base, 1), [_ids(base, row_tokens(recipe) - 1)], [row]) for row in range(groups)]
    elif recipe.spec.rows == "pairs":
        half = row_tokens(recipe) // 2
        pair = [_ids(base, half), _ids(base, half)]
        whole = with_bootstrap_position(
            [Group(_ids(base, half), pair, [2 * row, 2 * row + 1]) for row in range(groups)]
        )
    else:
        count = lengths.num_generations
        answers = [_ids(base, lengths.max_completion_length)] * count
        prompt = _ids(base, recipe.data.max_prompt_length)
        whole = [Group(prompt, answers, list(range(row * count, (row + 1) * count))) for row in range(groups)]
    return max(base.layout.split(whole, tokens), key=lambda part: sum(group.tokens for group in part))


def _pass(base: SharedBase, groups: Sequence[Group], role: str, plan: Plan, language: bool) -> None:
    with torch.no_grad(), base.role(role):
        packed = base.layout.lay_out(groups, base.device)
        if language:
            packed_logprobs(base, packed, 1.0, plan.settings.logits_tile_tokens, entropy="none")
        else:
            packed_outputs(base, POLICY, packed)


def _update(base: SharedBase, recipe: Recipe, plan: Plan, language: bool) -> None:
    for parameter in base.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    packed = base.layout.lay_out(_largest(base, recipe, plan.settings.micro_batch_tokens), base.device)
    if language:
        with base.role(POLICY):
            kind: Entropy = "gradient" if recipe.spec.entropy_gradient(recipe) else "value"
            logps, entropies = packed_logprobs(base, packed, 1.0, plan.settings.logits_tile_tokens, kind)
            (logps.mean() if kind == "value" else logps.mean() + entropies.mean()).backward()
            del logps, entropies
    for role in [CRITIC] if CRITIC in base.heads else [] if language else [POLICY]:
        with base.role(role):
            packed_outputs(base, role, packed).mean().backward()


@torch.no_grad()
def _rollout(base: SharedBase, recipe: Recipe, plan: Plan) -> None:
    """Prefill as many prompts as a wave has, and write the last token of its longest completions."""
    settings, length = plan.settings, recipe.generation.max_completion_length
    rows = rollout_rows(recipe, settings.rollout_batch_size)
    prompts = prompts_at_once(recipe, rows)
    each = max(1, rows // prompts)
    prompt = _ids(base, recipe.data.max_prompt_length)
    row_prompt = [b for b in range(prompts) for _ in range(each)]
    g = recipe.generation
    sampling = Sampling(g.temperature, repetition_penalty=g.repetition_penalty, min_new_tokens=g.min_new_tokens)
    engine = engine_for(base, recipe.generation.engine, settings.rollout_weights == "dequantized")
    if isinstance(engine, ContinuousEngine):
        limits = RolloutLimits(rows, settings.micro_batch_tokens, settings.logits_tile_tokens)
        with base.role(POLICY):
            engine.try_largest([prompt] * prompts, each, length, sampling, limits)
        return
    with base.role(POLICY), base.decoding(settings.rollout_weights == "dequantized"):
        state, _ = wave_engine(base).start([prompt] * prompts, row_prompt, length - 1, settings.micro_batch_tokens)
        tokens = torch.zeros(len(row_prompt), dtype=torch.long, device=base.device)
        if isinstance(state, SharedPromptCache):
            state.skip_to(length - 2)
        hidden = state.next_states(base, tokens)
        uniforms = torch.full((len(row_prompt),), 0.5, dtype=torch.float32, device="cpu")
        Draws(base, sampling, [prompt] * prompts, row_prompt, settings.logits_tile_tokens).next(
            hidden, uniforms, tokens
        )
