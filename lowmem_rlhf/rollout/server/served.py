"""What a server is to the engine that asks it, and how completions are cut as everywhere in this package."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.parallel import Ending
from lowmem_rlhf.rollout.ends import Ends
from lowmem_rlhf.rollout.rollout import Completion
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.server.adapter import PlainAdapter
from lowmem_rlhf.rollout.server.client import Written

MOST_BIASED = 1024  # tokens that nobody may draw are named in each request, up to so many


class Server(Protocol):
    """A server that samples on the base, or on it with the adapter that it was given last.

    All raise `ServerFault` where the server does not do what is asked.
    """

    name: str  # with its version, for messages

    def open(self, longest: int) -> None:
        """Find it or start it, and check that it can serve texts of so many tokens, prompt and completion together."""
        ...

    def check(self, base: SharedBase, text: Sequence[int]) -> float:
        """Check with a short text that it has our base, and tells the log-probs that are needed.

        It has the adapter of the role that the base is in.

        Returns:
            How far its log-probs are from ours, in nats a token.
        """
        ...

    def load(self, adapter: PlainAdapter | None) -> None:
        """Sample with this adapter from now on; None: with the base alone."""
        ...

    def write(
        self,
        prompt: Sequence[int],
        count: int,
        most: int,
        sampling: Sampling,
        seeds: Sequence[int],
        ending: Ending,
    ) -> list[Written]:
        """Return completions of a prompt.

        Args:
            count: how many.
            most: tokens of each, at most.
            seeds: of each.
            ending: ends requests before their time.
        """
        ...

    def rest(self) -> None:
        """Nothing is asked until the next `load`: give memory back, where the recipe says so."""
        ...

    def fault(self) -> str:
        """Return what became of a server that we started and that has ended; '' otherwise."""
        ...


def seeds_of(seed: int, rows: Sequence[int]) -> list[int]:
    """Return a seed of 31 bits for each of these completions of a rollout, far from those of other rollouts."""
    digests = [hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=4).digest() for row in rows]
    return [int.from_bytes(one, "big") >> 1 for one in digests]


def hidden_tokens(base: SharedBase) -> list[int]:
    """Return the logits that belong to no token and that a request names, none where they are many."""
    missing = [] if base.missing is None else base.missing.nonzero().flatten().tolist()
    return missing if len(missing) <= MOST_BIASED else []


def completions_of(found: Sequence[Written], ends: Ends) -> list[Completion]:
    """Return completions that end with the first token that ends one, wherever the server saw the end.

    A server looks for stop strings in text, and not before the least length; it may know of stop tokens that the model
    has not. Where it alone ended a completion, that is its end.
    """
    completions = []
    for one in found:
        ended = ends.of_one()
        place = next((i for i, token in enumerate(one.ids) if ended(token)), None)
        stop = len(one.ids) if place is None else place + 1
        completions.append(Completion(one.ids[:stop], one.logps[:stop], place is None and one.cut))
    return completions
