"""The engine of a rollout: what the trainer and held-out evaluation ask for completions.

Three engines sample on the shared base. For models that can be packed there are `ContinuousEngine`, on cards that
replay graphs, and `SharedPromptEngine`; `OwnCacheEngine` is for those that cannot. A server may do it too
(`server.engine.ServerEngine`: vLLM, llama.cpp). `register_engine` adds your own.
What a rollout takes is told to the planner by a function without torch (`planning.memory.rollout.ROLLOUT_BYTES`), since
a plan is made before anything is loaded.

Shapes: B prompts, G completions a prompt.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.planning.memory.rollout import ROLLOUT_BYTES, RolloutBytes, check_engine, shared_base_bytes
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.server import SERVERS
from lowmem_rlhf.rollout.continuous import ContinuousEngine
from lowmem_rlhf.rollout.graphs import can_capture
from lowmem_rlhf.rollout.own_cache import OwnCacheEngine
from lowmem_rlhf.rollout.rollout import Completion, Share
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.shared_prompt import SharedPromptEngine
from lowmem_rlhf.rollout.wave import WaveEngine


class Engine(Protocol):
    """What samples completions. It is asked inside ``base.role(...)``: completions are those of the role on the base.

    The sampling policy is the trained policy: an engine that keeps weights of its own takes the adapter over in `sync`,
    and the trainer measures after every rollout how far its log-probs are from the training pass
    (``sampling/logp_difference``).
    """

    def sync(self) -> None:
        """Take over the adapter of the base's role; called before every rollout and every evaluation."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        max_completion_length: int | Sequence[int],
        sampling: Sampling,
        limits: RolloutLimits,
        seed: int,
        progress: ProgressCallback | None = None,
        share: Share | None = None,
    ) -> list[list[Completion]]:
        """Return ``num_generations`` completions for each prompt.

        Args:
            prompts: token ids of the B prompts, none empty.
            num_generations: G.
            max_completion_length: the most tokens of a completion, or of one of each prompt, (B,).
            sampling: how tokens are drawn, and what ends a completion beside the model's stop tokens.
            limits: what bounds the memory; it must hold after `torch.OutOfMemoryError`, when smaller ones are tried.
            seed: the same seed gives the same completions, however many run at once.
            progress: called with (finished completions, all completions).
            share: where these completions stand among those of several processes, so that the seed gives the same
                ones as in a single process; not given by a run of one.

        Returns:
            B lists of G completions, each with the log-prob of every token, in nats at the sampling temperature and
            before the repetition penalty, top-k, top-p and min-p.

        Raises:
            RunError: the logits are not finite.
        """
        ...


EngineFactory = Callable[[SharedBase, bool | None], Engine]  # base, and whether NF4 weights are unpacked while sampling

ENGINES: dict[str, EngineFactory] = {
    "continuous": ContinuousEngine,
    "shared_prompt": SharedPromptEngine,
    "own_cache": OwnCacheEngine,
}


def register_engine(name: str, make: EngineFactory, rollout_bytes: RolloutBytes = shared_base_bytes) -> None:
    """Add an engine, which a recipe then names in ``generation.engine``.

    Args:
        name: in recipes.
        make: returns the engine for a base. It is also given whether the plan has NF4 weights unpacked while sampling.
        rollout_bytes: what the plan counts for a rollout; absent: as much as for this package's own engines.

    Raises:
        ValueError: the name is taken.
    """
    if name in ROLLOUT_BYTES:
        raise ValueError(f"engine {name!r} is there already; the engines are {', '.join(ROLLOUT_BYTES)}")
    ENGINES[name], ROLLOUT_BYTES[name] = make, rollout_bytes


def engine_for(
    base: SharedBase, name: str = "auto", dequantize: bool | None = None, served: Recipe | None = None
) -> Engine:
    """Return the engine of this name for a base.

    Args:
        name: of `ENGINES`, or ``auto``: what suits the model; or a server's.
        dequantize: whether NF4 weights are unpacked while sampling; None: they stay as the caller has them.
        served: the recipe of a run that trains, whose server is asked; without it this package's own engine samples in
            a server's place, as a run that is over needs none.

    Raises:
        UserError: there is no such engine, or the model cannot be sampled with it, or a server is not as it has to be.
    """
    check_engine(name)
    if name in SERVERS and served is not None:
        from lowmem_rlhf.rollout.server.engine import ServerEngine

        return ServerEngine(base, served)
    if name == "auto" or name in SERVERS:
        return own_engine(base, dequantize)
    if ENGINES[name] is ContinuousEngine and base.packable and base.rotary_limit is not None:
        raise UserError(
            f"generation.engine: {name} is not for {base.model_id!r}, whose positions depend on the longest text that "
            "is beside; leave it at auto"
        )
    packs = (ContinuousEngine, SharedPromptEngine)
    if (ENGINES[name] in packs and not base.packable) or (ENGINES[name] is OwnCacheEngine and base.packable):
        raise UserError(f"generation.engine: {name} is not for {base.model_id!r}; leave it at auto")
    return ENGINES[name](base, dequantize)


def wave_engine(base: SharedBase, dequantize: bool | None = None) -> WaveEngine:
    """Return the engine of waves that suits a model: a prompt's keys are shared where it can be packed."""
    return SharedPromptEngine(base, dequantize) if base.packable else OwnCacheEngine(base, dequantize)


def own_engine(base: SharedBase, dequantize: bool | None = None) -> Engine:
    """Return the engine of this package that suits a model and its device: graphs where passes can be captured."""
    if capabilities(base.device).graphs and can_capture(base.device) and base.packable and base.captures:
        return ContinuousEngine(base, dequantize)
    return wave_engine(base, dequantize)
