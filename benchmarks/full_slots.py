"""Count the decoding passes that completions take: continuous batching, a greedy refill at every token, and waves.

    python benchmarks/full_slots.py [--slots S] [--prompts B] [--generations G] [--seeds N] [--json]

The engine's own schedule runs with completions of given lengths in place of a model. A greedy refill, which looks at
every token, takes the fewest passes that a schedule can take that knows no length beforehand; looking takes a wait for
the device, so the engine looks every 8 tokens. Lengths are of three kinds: ``equal`` (256 tokens), ``lognormal``
(median 180, sigma 0.6, at most 512) and ``half cut`` (every second one runs into the limit of 512 tokens, the others
are lognormal).
"""

import argparse
import heapq
import json
import random
from collections.abc import Sequence
from typing import Any

LIMIT, STOP = 512, 1
KINDS = ("equal", "lognormal", "half cut")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--slots", type=int, default=32, help="completions at once")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser


def lengths(kind: str, count: int, seed: int) -> list[int]:
    """Return the tokens of so many completions."""
    chance = random.Random(seed)
    drawn = [min(LIMIT, max(1, round(180 * chance.lognormvariate(0, 0.6)))) for _ in range(count)]
    if kind == "equal":
        return [256] * count
    return [LIMIT if kind == "half cut" and i % 2 else n for i, n in enumerate(drawn)]


def greedy(wanted: Sequence[int], slots: int) -> int:
    """Return the passes of a refill at every token; a completion's first token is its prompt's."""
    ends = [0] * slots
    for length in wanted:
        heapq.heappush(ends, heapq.heappop(ends) + length - 1)
    return max(ends)


def in_waves(wanted: Sequence[int], generations: int, slots: int) -> int:
    """Return the passes of the engine of waves: each lasts as long as its longest completion."""
    from lowmem_rlhf.rollout.shared_prompt import waves

    divided = waves([20] * (len(wanted) // generations), generations, slots)
    return sum(max(wanted[row] for _, row in wave) - 1 for wave in divided)


def continuous(wanted: Sequence[int], generations: int, slots: int) -> int:
    """Return the passes of the engine's schedule."""
    import torch

    from lowmem_rlhf.planning.limits import slot_room
    from lowmem_rlhf.rollout.continuous import Schedule
    from lowmem_rlhf.rollout.sampling import Sampling
    from lowmem_rlhf.rollout.shared_prompt import PromptRun

    class Lengths:
        """Slots whose completions end after a given number of tokens."""

        stop_ids, sampling = frozenset({STOP}), Sampling()

        def __init__(self) -> None:
            self.count = self.rows = slots
            self.seen = self.room = slot_room(20, LIMIT)
            self.base: Any = self
            self.left = [0] * slots
            self.drawn: list[list[int]] = []

        def begin(self, chosen: Sequence[int], *others: Any) -> None:
            jobs = [int(job) for job in others[-1][:, 0]]
            for slot, job in zip(chosen, jobs, strict=True):
                self.left[slot] = wanted[job]
            self.draw(chosen)

        def draw(self, chosen: Sequence[int]) -> None:
            for slot in chosen:
                self.left[slot] -= 1
            self.drawn.append([STOP if left == 0 else 2 for left in self.left])

        def run(self, _: Any) -> None:
            self.draw(range(slots))

        def rest(self, chosen: Sequence[int]) -> None: ...

        def move(self, order: Sequence[int]) -> None:
            self.left[: len(order)] = [self.left[slot] for slot in order]

        def look(self, last: int) -> tuple[list[list[int]], list[list[float]]]:
            records = self.drawn[-last:]
            return records, [[0.0] * slots] * last

    class Simulated(Schedule):
        def _prefill(self, prompts: Sequence[Sequence[int]]) -> PromptRun:
            return PromptRun([torch.zeros(1, dtype=torch.float32, device="cpu")] * len(prompts), {}, {})

    held: Any = Lengths()
    jobs = torch.arange(len(wanted), dtype=torch.long, device="cpu")[:, None].expand(-1, LIMIT)
    prompts = len(wanted) // generations
    schedule = Simulated([[0] * 20] * prompts, generations, [LIMIT] * prompts, jobs, held, held, 4096)
    completions = schedule.run(None)
    assert [len(one.ids) for one in completions] == list(wanted)
    return schedule.passes


def measure(slots: int, prompts: int, generations: int, seeds: int) -> dict[str, dict[str, float]]:
    """Return by kind of lengths the passes, and their ratios to the greedy refill's."""
    found = {}
    for kind in KINDS:
        every = [lengths(kind, prompts * generations, seed) for seed in range(seeds)]
        passes = {
            "continuous": sum(continuous(one, generations, slots) for one in every),
            "greedy": sum(greedy(one, slots) for one in every),
            "waves": sum(in_waves(one, generations, slots) for one in every),
        }
        ratios = {f"{name} / greedy": passes[name] / passes["greedy"] for name in ("continuous", "waves")}
        found[kind] = {**{name: count / seeds for name, count in passes.items()}, **ratios}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    given = options().parse_args(arguments)
    for name in ("slots", "prompts", "generations", "seeds"):
        if getattr(given, name) < 1:
            raise SystemExit(f"--{name}: got {getattr(given, name)}; at least one is needed")
    found = measure(given.slots, given.prompts, given.generations, given.seeds)
    if given.json:
        print(json.dumps({**vars(given), "kinds": found}, indent=2))
        return
    columns = list(found[KINDS[0]])
    print(f"{'passes':<12}" + "".join(f"{name:>22}" for name in columns))
    for kind, row in found.items():
        print(f"{kind:<12}" + "".join(f"{row[name]:>22.{2 if '/' in name else 0}f}" for name in columns))


if __name__ == "__main__":
    main()
