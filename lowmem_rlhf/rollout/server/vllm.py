"""vLLM's OpenAI-compatible server.

Nothing here was run against a vLLM; this is what its source says, read in the wheels of 0.31.0 and 0.33.0, where these
fields are the same. Paths are below ``vllm/``:

| asked or read | file |
|---|---|
| GET /version -> version | entrypoints/serve/instrumentator/basic.py |
| GET /health | entrypoints/serve/instrumentator/health.py |
| GET /v1/models -> data[].id, root, parent, max_model_len | entrypoints/openai/models/serving.py, entrypoints/serve/engine/protocol.py (ModelCard) |
| POST /v1/completions: model, prompt (token ids), n, max_tokens, seed, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, min_tokens, stop, stop_token_ids, ignore_eos, include_stop_str_in_output, skip_special_tokens, logit_bias, logprobs, prompt_logprobs, return_token_ids, watermarking | entrypoints/openai/completion/protocol.py (CompletionRequest) |
| -> choices[].index, token_ids, logprobs.token_logprobs, prompt_logprobs, finish_reason | the same file (CompletionResponseChoice, CompletionLogProbs); -9999 stands for minus infinity: completion/serving.py |
| finish_reason: stop, length, abort, error, repetition | v1/engine/__init__.py (FINISH_REASON_STRINGS) |
| the seeds of n completions are seed, seed + 1, ... | v1/engine/parallel_sampling.py |
| greedy sampling takes n = 1 only | sampling_params.py (_verify_greedy_sampling) |
| POST /v1/load_lora_adapter: lora_name, lora_path; /v1/unload_lora_adapter: lora_name; there with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 | entrypoints/serve/lora/api_router.py, protocol.py |
| an adapter's files, its ranks and scale | lora/peft_helper.py |
| POST /sleep?level=1, /wake_up, GET /is_sleeping; there with VLLM_SERVER_DEV_MODE=1 | entrypoints/serve/dev/sleep/api_router.py (0.31 answers without a body) |
| errors: {"error": {"message", "type", "param", "code"}} | entrypoints/serve/engine/protocol.py (ErrorResponse) |
| log-probs: raw_logprobs before, processed_logprobs after temperature and all that shapes | config/model.py (logprobs_mode), v1/sample/sampler.py |
| serve MODEL --enable-lora --max-lora-rank --max-loras --max-model-len --logprobs-mode --gpu-memory-utilization --enable-sleep-mode | engine/arg_utils.py; ranks: config/lora.py (MaxLoRARanks) |
"""  # noqa: E501 (rows of a table)

import re
import shlex
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.http_client import Address
from lowmem_rlhf.parallel import Ending
from lowmem_rlhf.progress import message
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.server import ServerConfig
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.server.adapter import PlainAdapter, save_plain
from lowmem_rlhf.rollout.server.check import logps_of, text_difference
from lowmem_rlhf.rollout.server.client import Client, ServerFault, Written, list_of, written
from lowmem_rlhf.rollout.server.process import StartedServer, free_port
from lowmem_rlhf.rollout.server.served import hidden_tokens

OLDEST, NEWEST = (0, 31), (0, 33)  # whose source was read
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
RAW, PROCESSED = "raw_logprobs", "processed_logprobs"
_SURE = 100.0  # a bias that leaves no other token a chance; vLLM takes no more


class VLLM:
    """A vLLM that runs, or one that is started beside.

    Args:
        base: whose completions they are.
        recipe: has `generation.server`.
        folder: where adapters are written, which the server sees too.
    """

    def __init__(self, base: SharedBase, recipe: Recipe, folder: Path) -> None:
        self.config = recipe.generation.server or ServerConfig()
        self.recipe, self.folder, self.name = recipe, folder, "vLLM"
        self._stops, self._vocabulary = sorted(base.stop_ids), base.rows
        self._biases = dict.fromkeys(map(str, hidden_tokens(base)), -_SURE)
        self._prefix, self._count = f"lowmem-rlhf-{uuid.uuid4().hex[:8]}", 0
        self._loaded: Path | None = None
        self._model, self._asleep = "", False
        self._started: StartedServer | None = None
        self._mode = RAW if recipe.generation.temperature == 1 else PROCESSED
        self._shaped = bool(recipe.generation.shaping)

    def open(self, longest: int) -> None:
        """See `Server.open`."""
        address = self._start(longest) if self.config.url is None else self._named()
        self._client = Client(address, self.config.timeout)
        self.url = self._client.address.url
        if self._started:
            self._started.wait(self._client, "/health", self.config.start_timeout)
        self._check_version()
        card = self._card()
        self._model = card["id"]
        limit = card.get("max_model_len")
        if isinstance(limit, int) and limit < longest:
            raise ServerFault(
                f"{self.url} takes texts of {limit} tokens (max_model_len), and prompt and completion have up to "
                f"{longest} together; start it with --max-model-len {longest}, or lower data.max_prompt_length or "
                "generation.max_completion_length"
            )
        if self.config.sleep:
            self._check_sleep()

    def check(self, base: SharedBase, text: Sequence[int]) -> float:
        """Check with a text that its base is ours, and which log-probs it tells (see `Server.check`)."""
        choice = self._asked([*text], 1, 1, Sampling(), [0], Ending(), prompt_logprobs=0)[0]
        theirs = self._of_prompt(choice, text)
        difference = text_difference(base, theirs, logps_of(base, text[:1], text[1:]), self.url, self.recipe.model)
        likely = {token: logps_of(base, text, [token])[0] for token in dict.fromkeys(text[:4])}
        rare, ours = min(likely.items(), key=lambda item: item[1])
        told = self._asked([*text], 1, 1, Sampling(), [0], Ending(), logit_bias={str(rare): _SURE})[0]
        value = self._written(told).logps[0]
        if value > 0.01:
            mode = "raw_logits or processed_logits"
        else:
            mode = RAW if abs(value - ours) < abs(value) else PROCESSED
        if mode != self._mode and (self._shaped or self._mode == PROCESSED or mode not in (RAW, PROCESSED)):
            raise ServerFault(
                f"{self.url} tells {mode}, and what is learned needs log-probs at the sampling temperature before "
                f"top-k, top-p, min-p and penalties; start it with --logprobs-mode {self._mode}"
            )
        return difference

    def load(self, adapter: PlainAdapter | None) -> None:
        """See `Server.load`."""
        if self._asleep:
            self._client.ask("/wake_up", post=True)
            self._asleep = False
        if adapter is None:
            self._unload()
            return
        self._count += 1
        folder = self.folder / f"{self._prefix}-{self._count}"  # cached prompts hang on its name: a new one each time
        save_plain(adapter, folder, self.recipe.model)
        try:
            self._client.ask("/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
        except ServerFault as fault:
            shutil.rmtree(folder, ignore_errors=True)
            raise ServerFault(f"{fault}; {self._why_not_loaded(fault, adapter.rank)}", fault.status) from None
        self._unload()
        self._loaded = folder

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
        asked = 1 if sampling.temperature == 0 else count  # the likeliest tokens are the same each time
        choices = self._asked(prompt, asked, most, sampling, seeds, ending)
        return [self._written(choice) for choice in choices] * (count // asked)

    def _written(self, choice: dict[str, Any]) -> Written:
        reason, logprobs = choice.get("finish_reason"), choice.get("logprobs")
        if reason not in ("stop", "length"):
            raise ServerFault(f"{self.url} ended a completion for another reason: {reason!r}")
        logps = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        return written(choice.get("token_ids"), logps, reason == "length", self._vocabulary, self.url)

    def rest(self) -> None:
        """See `Server.rest`."""
        if self.config.sleep and not self._asleep:
            self._client.ask("/sleep?level=1", post=True)
            self._asleep = True

    def fault(self) -> str:
        """See `Server.fault`."""
        return self._started.fault() if self._started else ""

    def _named(self) -> Address:
        try:
            return self.config.address
        except ValueError as error:
            raise ServerFault(f"generation.server.{error}") from None

    def _start(self, longest: int) -> Address:
        config, rank = self.config, self.recipe.lora.rank
        words = shlex.split(config.command or "vllm")
        if shutil.which(words[0]) is None:
            raise ServerFault(
                f"generation.server.command: there is no program {words[0]}; install vLLM in an environment of its own "
                "and name its vllm, or give generation.server.url of a server that runs"
            )
        url = f"http://127.0.0.1:{(port := free_port())}"
        revision = ["--revision", self.recipe.revision] if self.recipe.revision else []
        share = config.gpu_memory_utilization
        wide = next((one for one in RANKS if one >= rank), rank)
        command = [
            *(*words, "serve", config.model or resolve_model(self.recipe.model), "--host", "127.0.0.1"),
            *("--port", str(port), "--enable-lora", "--max-lora-rank", str(wide), "--max-loras", "1"),
            *("--max-model-len", str(longest), "--logprobs-mode", self._mode, *revision),
            *([] if share is None else ["--gpu-memory-utilization", f"{share:g}"]),
            *(["--enable-sleep-mode"] if config.sleep else []),
            *shlex.split(config.options or ""),
        ]
        more = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        more |= {"VLLM_SERVER_DEV_MODE": "1"} if config.sleep else {}
        more |= {"CUDA_VISIBLE_DEVICES": config.devices} if config.devices is not None else {}
        self._started = StartedServer(command, more, self.folder / "server.log")
        return ServerConfig(url=url).address

    def _check_version(self) -> None:
        try:
            version = self._client.object("/version").get("version")
        except ServerFault as fault:
            if fault.status is None:
                raise
            version = None
        parts = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
        if parts is None:
            raise ServerFault(f"{self.url} is no vLLM: it has no /version; mend generation.server.url")
        number = (int(parts[1]), int(parts[2]))
        if number < OLDEST:
            raise ServerFault(
                f"{self.url} is vLLM {version}; this package knows it from {_dotted(OLDEST)} on, update it there"
            )
        self.name = f"vLLM {version}"
        if number > NEWEST:
            message(
                f"{self.url} is vLLM {version}, newer than what this package was written for ({_dotted(OLDEST)} to "
                f"{_dotted(NEWEST)}); what it answers is checked all the same"
            )

    def _card(self) -> dict[str, Any]:
        """Return what the server says of its base, which has to be ours."""
        cards = self._client.object("/v1/models").get("data")
        if not list_of(cards, dict):
            raise ServerFault(f"{self.url}/v1/models answered without a list of models")
        bases = [card for card in cards or [] if not card.get("parent") and isinstance(card.get("id"), str)]
        wanted = self.config.model or self.recipe.model
        ours = {wanted, resolve_model(wanted)}
        ours |= {str(Path(one).resolve()) for one in ours if Path(one).exists()}
        for card in bases:
            if self._started or ours & {card["id"], str(card.get("root"))}:
                return dict(card)
        served = ", ".join(repr(card.get("root") or card["id"]) for card in bases) or "none"
        raise ServerFault(
            f"{self.url} has another base: it serves {served}, and the recipe's model is {self.recipe.model!r}; start "
            "it with that one, or name the same model as the server has it in generation.server.model"
        )

    def _check_sleep(self) -> None:
        try:
            asleep = self._client.object("/is_sleeping").get("is_sleeping")
        except ServerFault as fault:
            if fault.status is None:
                raise
            raise ServerFault(
                f"generation.server.sleep: {self.url} cannot be sent to sleep; start it with VLLM_SERVER_DEV_MODE=1 "
                "and --enable-sleep-mode, or set it to false"
            ) from None
        self._asleep = bool(asleep)  # as an earlier run may have left it

    def _why_not_loaded(self, fault: ServerFault, rank: int) -> str:
        if fault.status in (404, 405) and "adapter" not in str(fault).partition("(")[2].lower():
            return "it takes no adapters while it runs: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        if fault.status is None:
            return "the adapter was not handed over"
        return (
            f"it did not take the adapter: it needs --enable-lora and --max-lora-rank of at least {rank}, and has to "
            f"see the folder {self.folder} (generation.server.adapters)"
        )

    def _unload(self) -> None:
        if self._loaded is not None:
            self._client.ask("/v1/unload_lora_adapter", {"lora_name": self._loaded.name})
            shutil.rmtree(self._loaded, ignore_errors=True)
            self._loaded = None

    def _asked(
        self,
        prompt: Sequence[int],
        count: int,
        most: int,
        sampling: Sampling,
        seeds: Sequence[int],
        ending: Ending,
        **more: Any,
    ) -> list[dict[str, Any]]:
        """Return the choices of one request, in order."""
        question = {
            "model": self._model if self._loaded is None else self._loaded.name,
            "prompt": list(prompt),
            "n": count,
            "max_tokens": most,
            "seed": seeds[0],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": sampling.min_new_tokens,
            "stop": list(sampling.stop_strings),
            "stop_token_ids": self._stops,
            "ignore_eos": True,  # what ends a completion is told, and nothing else does
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "watermarking": False,
            **({"logit_bias": self._biases} if self._biases else {}),
            **more,
        }
        choices = self._client.object("/v1/completions", question, ending).get("choices")
        if not list_of(choices, dict) or len(choices or []) != count:
            got = len(choices) if isinstance(choices, list) else "no"
            raise ServerFault(f"{self.url} answered with {got} completions, and {count} were asked for")
        assert choices is not None
        return sorted(choices, key=lambda one: one.get("index", 0))

    def _of_prompt(self, choice: dict[str, Any], text: Sequence[int]) -> list[float]:
        """Return the log-probs of a text's tokens but the first."""
        told = choice.get("prompt_logprobs")
        if not isinstance(choice.get("logprobs"), dict) or not isinstance(told, list) or len(told) != len(text):
            raise ServerFault(f"{self.url} serves no log-probs; start it without what switches them off")
        values = [(one or {}).get(str(token)) for one, token in zip(told[1:], text[1:], strict=True)]
        if not list_of(values, dict):
            raise ServerFault(f"{self.url} serves no log-probs of a text's own tokens: it has another vocabulary")
        return [float(one["logprob"]) for one in values if one is not None]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
