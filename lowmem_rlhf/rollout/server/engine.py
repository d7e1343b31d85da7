"""The engine that asks a server for completions."""

import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.memory import release
from lowmem_rlhf.parallel import Ending, in_parallel
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.server import LLAMA_CPP, ServerConfig
from lowmem_rlhf.rollout.ends import Ends
from lowmem_rlhf.rollout.rollout import Completion, Share
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.server.adapter import plain_adapter
from lowmem_rlhf.rollout.server.check import check_text
from lowmem_rlhf.rollout.server.client import ServerFault
from lowmem_rlhf.rollout.server.llama_cpp import LlamaCpp
from lowmem_rlhf.rollout.server.served import Server, completions_of, seeds_of
from lowmem_rlhf.rollout.server.vllm import VLLM
from lowmem_rlhf.rollout.wave import most_tokens


class ServerEngine:
    """Completions of a server that has the same base, and the role's adapter as it was at the last `sync`.

    Its log-probs are those of its own kernels and its own weights: they differ from ours by more than rounding here
    does, and `grpo.importance_sampling_correction` weighs for that.

    Args:
        base: the base; it is asked for log-probs of a short text, which are compared.
        recipe: names the server.

    Raises:
        UserError: the server is not there, or not what the recipe needs.
    """

    def __init__(self, base: SharedBase, recipe: Recipe) -> None:
        self.base, self.config = base, recipe.generation.server or ServerConfig()
        tasks = recipe.by_task.values()
        longest = max(one.data.max_prompt_length + one.generation.max_completion_length for one in tasks)
        self._folder = Path(tempfile.mkdtemp(prefix="lowmem-rlhf-", dir=_made(self.config.adapters)))
        self._gone = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        kind = LlamaCpp if recipe.generation.engine == LLAMA_CPP else VLLM
        self.server: Server = kind(base, recipe, self._folder)
        try:
            self.server.open(longest)
            with base.role(POLICY):
                self.server.load(plain_adapter(base))
                difference = self.server.check(base, check_text(base, longest))
            self.server.rest()
        except ServerFault as fault:
            raise UserError(self._with_end(fault)) from None
        self.note = (
            f"{self.server.name} samples; on a short text its log-probs are {difference:.2g} nats a token from ours"
        )

    def sync(self) -> None:
        """Hand the adapter of the base's role to the server.

        Raises:
            RunError: the server does not take it.
        """
        if self.config.sleep:
            release(self.base.device)  # what our allocator holds unused is what the server needs
        with self._in_a_run():
            self.server.load(plain_adapter(self.base))

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
        """Sample completions of the role at the last `sync`; see `rollout.engine.Engine.generate`.

        The limits are those of our own memory, of which nothing is taken. A seed gives the same draws; how a server
        rounds may hang on what it writes at the same time.
        """
        most, ends = most_tokens(max_completion_length, len(prompts)), Ends(self.base, sampling)
        whole = not isinstance(self.server, LlamaCpp)  # one request a prompt, else one a completion
        each = num_generations if whole or sampling.temperature == 0 else 1
        jobs = [(b, g) for b in range(len(prompts)) for g in range(0, num_generations, each)]
        done, lock, first = 0, threading.Lock(), share.first if share else 0

        def write(job: tuple[int, int], ending: Ending) -> list[Completion]:
            nonlocal done
            b, g = job
            rows = [first + b * num_generations + g + i for i in range(each)]
            found = self.server.write(prompts[b], each, most[b], sampling, seeds_of(seed, rows), ending)
            completions = completions_of(found, ends)
            with lock:
                done += each
                if progress:
                    progress(done, len(prompts) * num_generations)
            return completions

        with self._in_a_run():
            parts = in_parallel(write, jobs, self.config.parallel)
            self.server.rest()
        rows = [one for part in parts for one in part]
        return [rows[i : i + num_generations] for i in range(0, len(rows), num_generations)]

    @contextmanager
    def _in_a_run(self) -> Iterator[None]:
        try:
            yield
        except ServerFault as fault:
            raise RunError(
                f"{self._with_end(fault)}; start the server again and go on with --resume from the last checkpoint"
            ) from None

    def _with_end(self, fault: ServerFault) -> str:
        """Return what is wrong, and of a server that we started whether it has ended."""
        end = self.server.fault()
        return f"{fault}; {end}" if end and end not in str(fault) else str(fault)


def _made(folder: str | None) -> str | None:
    """Return the folder that adapters are written below, made where it is not there; None: a temporary place."""
    if folder is None:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"generation.server.adapters: {folder} cannot be written to: {error.strerror}") from error
    return str(Path(folder).resolve())
