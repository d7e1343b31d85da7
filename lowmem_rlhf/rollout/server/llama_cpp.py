"""llama.cpp's server, which takes an adapter only when it is started: with each step's it is started anew.

``POST /lora-adapters`` changes the scales of adapters that are there, and loads none. Where a stop string ends a
completion the server leaves its log-probs out, so strings are looked for here, and it writes on to the length. It also
leaves out those of tokens that end within a character; these are asked for one by one, from the whole distribution.
Read in tools/server (server-task.cpp, server-context.cpp, README.md) and seen of the server in the wheel
xllamacpp 2026.10.11549:

| asked or read | what it is |
|---|---|
| --model, --lora, --host, --port, --ctx-size, --parallel | options of llama-server |
| GET /health; GET /props -> default_generation_settings.n_ctx (of one slot), build_info | server and model |
| GET /lora-adapters -> [{id, path, scale}] | adapters that were loaded |
| POST /completion: prompt (token ids), n_predict, seed, temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, samplers, logit_bias, n_probs, post_sampling_probs, return_tokens, cache_prompt, stream | one completion |
| -> tokens, completion_probabilities[].logprob (before all samplers) or .prob (post_sampling_probs), stop_type: eos, limit, word | the stop token is among the tokens |
| errors: {"error": {"code", "message", "type"}} | as vLLM's |
"""  # noqa: E501 (rows of a table)

import math
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.parallel import Ending
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.server import ServerConfig
from lowmem_rlhf.rollout.ends import TokenBytes
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.server.adapter import PlainAdapter
from lowmem_rlhf.rollout.server.check import logps_of, text_difference
from lowmem_rlhf.rollout.server.client import Client, ServerFault, Written, list_of, written
from lowmem_rlhf.rollout.server.gguf_adapter import save_gguf_adapter
from lowmem_rlhf.rollout.server.process import StartedServer, free_port
from lowmem_rlhf.rollout.server.served import hidden_tokens

_SAMPLERS = ["penalties", "temperature", "top_k", "min_p", "top_p"]  # the order of `rollout.sampling`


class LlamaCpp:
    """A llama-server that is started with the adapter; arguments as `vllm.VLLM`'s."""

    def __init__(self, base: SharedBase, recipe: Recipe, folder: Path) -> None:
        self.config = recipe.generation.server or ServerConfig()
        self.recipe, self.folder, self.name = recipe, folder, "llama.cpp's server"
        self._transformers_config, self._vocabulary = base.model.config, base.rows
        self._hidden = [[one, False] for one in hidden_tokens(base)]
        self._bytes, self._plain = TokenBytes(base.tokenizer), plain_token(base)
        self._silent = frozenset(base.tokenizer.all_special_ids)
        self._adapter: PlainAdapter | None = None
        self._started: StartedServer | None = None

    def open(self, longest: int) -> None:
        """See `Server.open`; it is started once its adapter is known."""
        self._longest = longest
        self._words = shlex.split(self.config.command or "llama-server")
        if shutil.which(self._words[0]) is None:
            raise ServerFault(
                f"generation.server.command: there is no program {self._words[0]}; install llama.cpp, and name its "
                "llama-server"
            )
        self._gguf = resolve_model(self.config.model or self.recipe.model)
        if not self._gguf.endswith(".gguf") or not Path(self._gguf).is_file():
            raise ServerFault(
                f"generation.server.model: llama.cpp reads a GGUF, and {self._gguf} is none; give the same base as a "
                "GGUF there"
            )

    def check(self, base: SharedBase, text: Sequence[int]) -> float:
        """Check with sampled tokens that its base is ours (see `Server.check`)."""
        heat = self.recipe.generation.temperature
        found = self.write(text, 1, min(16, self._longest - len(text)), Sampling(heat), [0], Ending())[0]
        return text_difference(base, found.logps, logps_of(base, text, found.ids, heat), self.url, self.recipe.model)

    def load(self, adapter: PlainAdapter | None) -> None:
        """See `Server.load`."""
        if self._started is not None:
            self._started.stop()
        self._adapter = adapter
        self._start()

    def write(
        self,
        prompt: Sequence[int],
        count: int,
        most: int,
        sampling: Sampling,
        seeds: Sequence[int],
        ending: Ending,
    ) -> list[Written]:
        """See `Server.write`."""
        asked = 1 if sampling.temperature == 0 else count
        found = [self._one(prompt, most, sampling, seed, ending) for seed in seeds[:asked]]
        return found * (count // asked)

    def rest(self) -> None:
        """See `Server.rest`: it is ended, as the next adapter needs it to be anyway."""
        if self.config.sleep and self._started is not None:
            self._started.stop()
            self._started = None

    def fault(self) -> str:
        """See `Server.fault`."""
        return self._started.fault() if self._started else ""

    def _start(self) -> None:
        """Start it with the adapter, and wait until it answers."""
        config, url = self.config, f"http://127.0.0.1:{(port := free_port())}"
        adapter = []
        if self._adapter is not None:
            save_gguf_adapter(self._adapter, self.folder / "adapter.gguf", self._transformers_config)
            adapter = ["--lora", str(self.folder / "adapter.gguf")]
        command = [
            *(*self._words, "--model", self._gguf, *adapter, "--host", "127.0.0.1", "--port", str(port)),
            *("--parallel", str(config.parallel), "--ctx-size", str(config.parallel * (self._longest + 1))),
            *shlex.split(config.options or ""),
        ]
        more = {"CUDA_VISIBLE_DEVICES": config.devices} if config.devices is not None else {}
        self._started = StartedServer(command, more, self.folder / "server.log")
        self.url = url
        self._client = Client(ServerConfig(url=url).address, config.timeout)
        self._started.wait(self._client, "/health", config.start_timeout)
        props = self._client.object("/props")
        self.name = f"llama.cpp's server ({props.get('build_info', 'unknown build')})"
        settings = props.get("default_generation_settings")
        room = settings.get("n_ctx") if isinstance(settings, dict) else None
        if isinstance(room, int) and room < self._longest:
            raise ServerFault(
                f"{url} takes texts of {room} tokens, and prompt and completion have up to {self._longest} together; "
                "take --ctx-size and --parallel out of generation.server.options, or lower data.max_prompt_length or "
                "generation.max_completion_length"
            )
        loaded = self._client.ask("/lora-adapters")
        if not list_of(loaded, dict) or len(loaded) != len(adapter) // 2:
            raise ServerFault(f"{url} did not load the adapter: it tells of {loaded!r}")

    def _one(self, prompt: Sequence[int], most: int, sampling: Sampling, seed: int, ending: Ending) -> Written:
        after = sampling.temperature not in (0.0, 1.0)  # then nothing but the temperature shapes, see `why_not_served`
        question = {
            "prompt": list(prompt),
            "n_predict": most,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": len(prompt) + most,  # all of the text; not every build takes -1 for it
            "samplers": _SAMPLERS,
            "logit_bias": self._hidden,
            "n_probs": 1,
            "post_sampling_probs": after,
            "return_tokens": True,
            "cache_prompt": True,
            "stream": False,
        }
        reply = self._client.object("/completion", question, ending)
        ids, told = reply.get("tokens"), reply.get("completion_probabilities")
        reason = reply.get("stop_type")
        if reason not in ("eos", "limit"):
            raise ServerFault(f"{self.url} ended a completion for another reason: {reason!r}")
        logps = self._logps(prompt, ids, told, sampling.temperature if after else 1.0, ending)
        return written(ids, logps, reason == "limit", self._vocabulary, self.url)

    def _logps(self, prompt: Sequence[int], ids: Any, told: Any, temperature: float, ending: Ending) -> Any:
        """Return a completion's log-probs at a temperature, of whatever form what was told is (see `written`)."""
        if not list_of(ids, int) or not list_of(told, dict):
            return None
        values = [one["logprob"] if "logprob" in one else _log(one.get("prob")) for one in told]
        if len(values) == len(ids):
            return values
        places = whole_places(ids, self._bytes, self._silent)
        expected = [one.get("id") for one in told] == [ids[place] for place in places]
        known = dict(zip(places, values, strict=True)) if expected else {}
        return [
            known[place] if place in known else self._asked_for([*prompt, *ids[:place]], token, temperature, ending)
            for place, token in enumerate(ids)
        ]

    def _asked_for(self, text: Sequence[int], token: int, temperature: float, ending: Ending) -> float:
        """Return the log-prob of a token behind a text, whatever the server writes there."""
        question = {
            "prompt": list(text),
            "n_predict": 1,
            "n_probs": self._vocabulary,
            "post_sampling_probs": False,
            "logit_bias": [[self._plain, 100.0]],  # a token with a whole character, or nothing is told
            "samplers": ["temperature"],
            "cache_prompt": True,
            "stream": False,
        }
        told = self._client.object("/completion", question, ending).get("completion_probabilities")
        found = told[0].get("top_logprobs") if list_of(told, dict) and told else None
        if not list_of(found, dict) or not all(isinstance(one.get("logprob"), float) for one in found or []):
            raise ServerFault(f"{self.url} does not tell the distribution of a token")
        logps = {one.get("id"): one["logprob"] / temperature for one in found or []}
        largest = max(logps.values(), default=0.0)
        total = largest + math.log(sum(math.exp(one - largest) for one in logps.values()) or 1.0)
        return float(logps.get(token, -math.inf) - total)


def whole_places(ids: Sequence[int], bytes_of: Mapping[int, bytes], silent: Collection[int]) -> list[int]:
    """Return the places of tokens behind which a text does not end within a character, as llama.cpp looks at it.

    Args:
        bytes_of: the bytes of each token.
        silent: tokens that are no text.
    """
    text, places = b"", []
    for place, token in enumerate(ids):
        text = (text + (b"" if token in silent else bytes_of[token]))[-4:]
        last = list(enumerate(reversed(text), 1))
        if not any(
            (byte & 0xE0 == 0xC0 and i < 2) or (byte & 0xF0 == 0xE0 and i < 3) or (byte & 0xF8 == 0xF0 and i < 4)
            for i, byte in last
        ):
            places.append(place)
    return places


def plain_token(base: SharedBase) -> int:
    """Return a token that stands for whole characters."""
    ids: list[int] = base.tokenizer("a", add_special_tokens=False).input_ids
    return ids[-1]


def _log(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.log(value) if value > 0 else -math.inf
    return None
