"""Continuous batching: a completion that ends gives its slot to the next one, and a token is one graph of the device.

The engine of cards that replay graphs, for models that can be packed. Shapes are fixed (`rollout.slots`), so the host
has nothing to do for a token but to start its graph. It looks at what was written every `LOOK` tokens: then completions
that have ended are taken out, the next ones begin in their slots, and where no more are waiting the slots that are left
move together and a graph of fewer rows goes on. A slot that has ended runs on until then, 3.5 tokens on average; what
it writes behind a stop token or a stop string is dropped.

A prompt runs once for all of its completions, but its keys lie in each of their slots: one attention call for a layer
then reads all that a row sees, and a slot takes any completion.

Shapes: B prompts, G completions a prompt, S slots.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.planning.limits import LOOK, seen_room, slot_room
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.rollout.ends import Ended, Ends
from lowmem_rlhf.rollout.graphs import StepGraphs
from lowmem_rlhf.rollout.rollout import Completion, Share
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.shared_prompt import PromptRun, prompt_chunks, run_prompts
from lowmem_rlhf.rollout.slots import Slots
from lowmem_rlhf.rollout.wave import check_finite, drawn_ahead, most_tokens

FEWEST_ROWS = 4  # of a graph: fewer rows are not faster


@dataclass
class _Writing:
    """A completion that is being written, of at most so many tokens."""

    job: int
    prompt_length: int
    most: int
    ended: Ended
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    fresh: bool = True  # its first token, which the prompt's pass has drawn, was not read yet


class ContinuousEngine:
    """Samples on the shared base itself; see `rollout.engine.Engine`.

    Args:
        base: the base; completions are those of the role that it is in.
        dequantize: whether NF4 weights are unpacked while sampling; None: they stay as the caller has them.
        capture: whether passes become graphs where the device has them.

    Attributes:
        passes: decoding passes of the last rollout.
        note: a sentence where passes are not captured.
    """

    def __init__(self, base: SharedBase, dequantize: bool | None = None, capture: bool = True) -> None:
        self.base, self.dequantize, self.passes = base, dequantize, 0
        self._graphs = StepGraphs(base.device, capture)
        self._slots: Slots | None = None  # of the last rollout, while they are kept
        self._made_for: tuple[Any, ...] = ()

    @property
    def note(self) -> str:
        """What a user should know about how tokens are decoded; empty where it is by graphs."""
        why = self._graphs.why_not
        return f"decoding starts its kernels one by one, since it cannot be captured as a graph: {why}" if why else ""

    def sync(self) -> None:
        """Do nothing: the adapters that train are the ones that sample."""

    def release(self) -> None:
        """Let go of what is kept from one rollout to the next (`RolloutLimits.keep_graphs`)."""
        self._slots, self._made_for = None, ()
        self._graphs.forget()
        self.base.let_go()

    @torch.no_grad()
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
        """Sample completions; see `rollout.engine.Engine.generate`."""
        total, most = len(prompts) * num_generations, most_tokens(max_completion_length, len(prompts))
        uniforms = drawn_ahead(total, max(most), seed, share)
        with self._schedule(prompts, num_generations, most, uniforms, sampling, limits) as schedule:
            completions = schedule.run(progress)
        self.passes = schedule.passes
        return [completions[i : i + num_generations] for i in range(0, total, num_generations)]

    @torch.no_grad()
    def try_largest(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        max_completion_length: int,
        sampling: Sampling,
        limits: RolloutLimits,
    ) -> None:
        """Run the prompts and one pass over all that slots hold, for the memory that a rollout takes."""
        uniforms = drawn_ahead(len(prompts) * num_generations, max_completion_length, seed=0)
        most = most_tokens(max_completion_length, len(prompts))
        with self._schedule(prompts, num_generations, most, uniforms, sampling, limits) as schedule:
            schedule.try_largest()

    @contextmanager
    def _schedule(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        most: Sequence[int],
        uniforms: torch.Tensor,
        sampling: Sampling,
        limits: RolloutLimits,
    ) -> Iterator["Schedule"]:
        base, (total, length) = self.base, uniforms.shape
        copies = None if self.dequantize is None else self.dequantize and limits.copy_weights
        room = slot_room(max(len(prompt) for prompt in prompts), length)
        keep = False
        with nullcontext() if copies is None else base.decoding(copies, limits.copy_weights):
            try:
                slots = self._slots_for(min(limits.rows, total), room, sampling, limits.tile)
                on_device = uniforms.to(base.device)
                yield Schedule(prompts, num_generations, most, on_device, slots, self._graphs, limits.prefill_tokens)
                keep = limits.keep_graphs and not copies
            finally:
                if not keep:
                    self.release()

    def _slots_for(self, count: int, room: int, sampling: Sampling, tile: int) -> Slots:
        """Return slots at rest: those of the last rollout, with their graphs, where they suit this one."""
        if not self._graphs.why_not and not self.base.captures:  # also where embeddings have gone to host memory since
            self._graphs.give_up("a pass of this model waits for the device")
        hidden = self.base.stop_ids if sampling.min_new_tokens else None
        made_for = (self.base.active.names, count, sampling, tile, self.base.missing, hidden)
        if self._slots is None or self._slots.room < room or made_for != self._made_for:
            self.release()
            self._slots, self._made_for = Slots(self.base, count, room, sampling, tile), made_for
        self.base.hold()
        for group in self.base.grouped_layers:
            group.adapters_now(self.base.dtype)  # writes what an optimizer step has changed to where graphs read it
        self._slots.reset()
        return self._slots


class Schedule:
    """One call of `ContinuousEngine.generate`: what waits, what is being written and what is done."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        most: Sequence[int],
        uniforms: torch.Tensor,
        slots: Slots,
        graphs: StepGraphs,
        prefill_tokens: int,
    ) -> None:
        self._prompts, self._each, self._uniforms = prompts, num_generations, uniforms
        self._slots, self._graphs, self._prefill_tokens = slots, graphs, prefill_tokens
        self._base, self._most, self._ends = slots.base, most, Ends(slots.base, slots.sampling)
        # the longest first: running out of memory shows at once
        order = sorted(range(len(prompts)), key=lambda b: -len(prompts[b]))
        self._waiting = deque((b, b * num_generations + g) for b in order for g in range(num_generations))
        self._ready: dict[int, tuple[PromptRun, int]] = {}  # prompts that have run, with their place in the run
        self._writing: list[_Writing | None] = [None] * slots.count
        self._done: dict[int, Completion] = {}
        self.passes = 0

    def run(self, progress: ProgressCallback | None) -> list[Completion]:
        """Write all completions; return them in order."""
        total = len(self._uniforms)
        while True:
            self._fill()
            if not any(self._writing):
                return [self._done[job] for job in range(total)]
            self._gather()
            steps = self._decode()
            before = len(self._done)
            self._read(steps)
            if progress and len(self._done) > before:
                progress(len(self._done), total)

    def try_largest(self) -> None:
        """Begin what slots take, and run one pass over all of their room."""
        self._fill()
        self._slots.seen = self._slots.room
        self._graphs.run(self._slots)

    def _fill(self) -> None:
        """Begin completions in the slots that are free."""
        free = [i for i, one in enumerate(self._writing) if one is None]
        begun = [(slot, *self._waiting.popleft()) for slot in free[: len(self._waiting)]]
        idle = free[len(begun) :]
        by_prompt: dict[int, list[tuple[int, int]]] = {}
        for slot, prompt, job in begun:
            by_prompt.setdefault(prompt, []).append((slot, job))
        new = [prompt for prompt in by_prompt if prompt not in self._ready]
        for chunk in prompt_chunks([self._prompts[prompt] for prompt in new], self._prefill_tokens):
            numbers, new = new[: len(chunk)], new[len(chunk) :]
            run = self._prefill(chunk)
            self._ready |= {number: (run, place) for place, number in enumerate(numbers)}
            del run
            for number in numbers:
                self._begin(number, by_prompt.pop(number))
        for number, members in by_prompt.items():
            self._begin(number, members)
        if idle:
            self._slots.rest(idle)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> PromptRun:
        return run_prompts(self._base, prompts)

    def _begin(self, number: int, members: list[tuple[int, int]]) -> None:
        """Begin completions of a prompt that has run, given as (slot, job); forget it with its last one."""
        run, place = self._ready[number]
        length, jobs = len(self._prompts[number]), [job for _, job in members]
        self._slots.begin(
            [slot for slot, _ in members],
            {layer: pairs[place] for layer, pairs in run.keys.items()},
            {key: state[place : place + 1] for key, state in run.states.items()},
            run.hidden[place][None],
            self._prompts[number],
            self._uniforms[jobs[0] : jobs[-1] + 1],
        )
        for slot, job in members:
            self._writing[slot] = _Writing(job, length, self._most[number], self._ends.of_one())
        if not any(prompt == number for prompt, _ in self._waiting):
            del self._ready[number]

    def _gather(self) -> None:
        """Choose the rows and the room of the next passes: as few as hold what is being written."""
        live = [i for i, one in enumerate(self._writing) if one is not None]
        rows = self._slots.rows
        while rows // 2 >= max(len(live), FEWEST_ROWS):
            rows //= 2
        if rows < self._slots.rows:
            self._slots.move(live)
            self._writing = [*(self._writing[i] for i in live), *[None] * (rows - len(live))]
            self._slots.rows = rows
            if len(live) < rows:
                self._slots.rest(range(len(live), rows))
        positions = [one.prompt_length + max(len(one.ids) - 1, 0) for one in self._writing if one is not None]
        self._slots.seen = seen_room(max(positions) + LOOK + 1, self._slots.room)

    def _decode(self) -> int:
        """Run as many passes as the host may leave unseen; return how many."""
        missing = [one.most - len(one.ids) - one.fresh for one in self._writing if one is not None]
        steps = min(LOOK, max(missing))
        for _ in range(steps):
            self._graphs.run(self._slots)
        self.passes += steps
        return steps

    def _read(self, steps: int) -> None:
        """Look at what so many passes wrote, and take out the completions that have ended."""
        tokens, logps = self._slots.look(steps + 1)  # one more: the first token of completions that have just begun
        for slot, one in enumerate(self._writing):
            if one is None:
                continue
            for place in range(0 if one.fresh else 1, steps + 1):
                token, logp = tokens[place][slot], logps[place][slot]
                check_finite(self._base, [logp], len(one.ids))
                one.ids.append(token)
                one.logps.append(logp)
                if (ended := one.ended(token)) or len(one.ids) == one.most:
                    self._done[one.job] = Completion(one.ids, one.logps, not ended)
                    self._writing[slot] = None
                    break
            one.fresh = False
