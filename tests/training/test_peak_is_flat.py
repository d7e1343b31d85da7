"""What a step's peak of live bytes depends on: not on generations, and on completion length by cache and row only."""

import pytest
from tiny_models import tiny_base
from training_cases import ladder_of, limits_of, objective_of, settings_of, stepper_of

from lowmem_rlhf.algorithms.grpo.update import update
from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.passes import completion_logprobs
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.planning.memory.layers import Layer
from lowmem_rlhf.planning.memory.rollout import decode_scores_bytes, kv_bytes_per_token
from lowmem_rlhf.planning.shapes import packed_shape
from lowmem_rlhf.progress import Silence
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.rollout.sampling import Sampling

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
}
PROMPT, ROWS, TILE, WIDTH = 16, 4, 32, 4
A_TOKEN = 12  # bytes of fp32 numbers a step keeps of each completion token: its uniform, and log-probs of two roles
SLACK = 1.1


class Step:
    """Steps of a tiny base, phase by phase under a counter."""

    def __init__(self) -> None:
        self.base, _ = tiny_base("llama", adapter=0, **SIZES)
        self.dims = dimensions_from_config(self.base.model.config.to_dict(), "tiny")
        self.optimizer = stepper_of(self.base.trainable())
        self.counter = LiveBytes()
        self.peaks(4, 8, 64)  # makes the optimizer's state

    def peaks(self, generations: int, length: int, tokens: int, prompts: int = 1) -> dict[str, int]:
        """Return each phase's peak bytes on top of what was live before it, with ``tokens`` a micro-batch."""
        base, found = self.base, {}
        ids = [[(7 * b + i) % SIZES["vocab_size"] for i in range(PROMPT)] for b in range(prompts)]
        limits = RolloutLimits(ROWS, tokens, TILE)

        def measured(name, work):
            before = self.counter.current
            self.counter.reset_peak()
            with self.counter:
                result = work()
            found[name] = self.counter.peak - before
            return result

        with base.role("policy"):
            groups = measured(
                "rollout", lambda: wave_engine(base).generate(ids, generations, length, Sampling(), limits, 0)
            )
        completions = [c for group in groups for c in group]
        assert {len(c.ids) for c in completions} == {length}
        batch = Rollout(ids, completions, generations, advantages=[(-1.0) ** n for n in range(len(completions))])
        rows = batch.groups(range(len(completions)))
        with base.role("reference"):
            reference = measured("score", lambda: completion_logprobs(base, rows, limits_of(tokens, TILE)))
        objective, ladder = objective_of(settings_of(beta=0.04), length), ladder_of(tokens, TILE)
        measured("update", lambda: update(base, self.optimizer, batch, objective, ladder, reference, Silence()))
        return found


@pytest.fixture(scope="module")
def endless_step():
    """Return steps whose completions never end early."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedBase, "stop_ids", frozenset())
        yield Step()


@pytest.fixture(params=[True, False], ids=["checkpointing", "all activations kept"])
def checkpointing(request):
    return request.param


@pytest.fixture
def step(endless_step, checkpointing):
    endless_step.base.set_gradient_checkpointing(checkpointing)
    return endless_step


def test_peak_is_flat_in_the_number_of_generations(step):
    length, prompts = 16, 2
    budget = PROMPT + 4 * (length - 1)  # four completions fill a micro-batch and, with ROWS, a wave
    few, many = (step.peaks(generations, length, budget, prompts) for generations in (4, 16))
    more_tokens = 12 * prompts * length
    for phase in few:
        assert many[phase] < 1.05 * few[phase], phase
        assert many[phase] - few[phase] <= A_TOKEN * more_tokens, phase


def test_peak_grows_with_completion_length_by_cache_and_one_packed_row_only(step, checkpointing):
    """Every completion is a packed row of its own here. Attention's scores, which the CPU spells out, are counted.

    While the cache grows, one layer's old room is there beside the new one.
    """
    short, long = 16, 64
    before, after = (step.peaks(8, length, PROMPT) for length in (short, long))
    dims = step.dims

    def bound(length: int) -> dict[str, float]:
        layer = Layer(
            dims,
            packed_shape(PROMPT, length - 1, length, 8, 1, PROMPT),
            WIDTH,
            beside=(),
            adapters=0,
            dense=0,
            explicit_scores=True,
            wide=False,
        )
        cache = ROWS * length * kv_bytes_per_token(dims, WIDTH)
        stored = dims.num_layers * (layer.hidden if checkpointing else layer.saved()) + 2 * layer.hidden
        again = layer.backward_peak() - (layer.hidden if checkpointing else layer.saved())
        return {
            "rollout": cache * (1 + 1 / dims.num_layers) + decode_scores_bytes(dims, ROWS, PROMPT + length, WIDTH),
            "score": layer.forward_peak() + layer.common(),
            "update": stored + again + layer.common(),
        }

    low, high = bound(short), bound(long)
    for phase, grown in ((phase, after[phase] - before[phase]) for phase in before):
        allowed = high[phase] - low[phase]
        assert 0 < grown < SLACK * allowed, (phase, grown, allowed)
