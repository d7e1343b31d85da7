"""The recipe's section `generation.server`: which server samples where another program does. Loads without torch."""

import shlex
from typing import Annotated

from pydantic import AfterValidator, Field

from lowmem_rlhf.http_client import Address, address_of
from lowmem_rlhf.recipe.bounds import MOST_SECONDS
from lowmem_rlhf.recipe.file_names import check_path
from lowmem_rlhf.recipe.section import Section

VLLM, LLAMA_CPP = "vllm", "llama_cpp"
SERVERS = {VLLM: "vLLM", LLAMA_CPP: "llama.cpp's server"}  # engines that are servers, and what they are called
EXAMPLE = "the address of the server, such as http://127.0.0.1:8000"


def _words(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"got {text!r}, which no shell could read ({error})") from error
    if not words:
        raise ValueError(f"got {text!r}; write null for none")
    return text


Words = Annotated[str, AfterValidator(_words)]
Where = Annotated[str, AfterValidator(check_path), Field(min_length=1)]


class ServerConfig(Section):
    """The server that samples, where generation.engine is vllm or llama_cpp."""

    url: Where | None = None  # of a vLLM server that runs; absent: a server is started beside the run
    command: Words | None = None  # the program that is started; absent: vllm, or llama-server
    options: Words | None = None  # further options of the program that is started, as in a shell
    # vllm: the base's name there, if not the recipe's model; llama_cpp: the base as a GGUF, if the model is none
    model: Where | None = None
    # where adapters are written for the server, a folder that both see; absent: a temporary one
    adapters: Where | None = None
    # what the server that is started sees of the cards (CUDA_VISIBLE_DEVICES), such as 1; absent: what the run sees
    devices: Annotated[str, Field(min_length=1)] | None = None
    # the server gives its card's memory back while the run trains
    sleep: bool = False
    # vllm: the share of its card that the server takes
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    parallel: int = Field(
        16, ge=1, le=1024
    )  # completions that llama.cpp's server writes at once, prompts asked of vLLM
    timeout: float = Field(600.0, gt=0, le=MOST_SECONDS)  # seconds for one request
    start_timeout: float = Field(900.0, gt=0, le=MOST_SECONDS)  # seconds until a server that is started answers
    api_key_env: Where | None = None  # the environment variable with the server's key
    allow_remote: bool = False  # let prompts go to an address that is not private

    @property
    def address(self) -> Address:
        """Where the server of `url` is.

        Raises:
            ValueError: it cannot be; the message begins with the key.
        """
        assert self.url is not None
        return address_of(self.url, "/v1", self.api_key_env, self.allow_remote, "prompts", EXAMPLE)


def why_not_served(engine: str, server: ServerConfig | None, shaped: list[str], temperature: float) -> str | None:
    """Return why an engine cannot sample as a recipe's `generation` says, beginning with a key; None: it can.

    Args:
        engine: of the recipe.
        shaped: keys that leave tokens out or make them less likely.
        temperature: of sampling.
    """
    if engine not in SERVERS:
        return f"server: is read where engine is {' or '.join(SERVERS)}; leave it out" if server is not None else None
    server = server or ServerConfig()
    if shaped and temperature != 1:
        return (
            f"temperature: got {temperature:g} beside {', '.join(shaped)}: {SERVERS[engine]} tells log-probs at "
            "temperature 1 before these, or at this one after them, and what is learned needs those at this one before "
            "them; set temperature to 1, or leave these out"
        )
    if engine == LLAMA_CPP:
        if server.url is not None:
            return (
                "server.url: llama.cpp's server takes an adapter only when it is started (--lora), so it is started "
                "anew with each step's; leave url out, and name the program in server.command"
            )
        if server.gpu_memory_utilization is not None:
            return "server.gpu_memory_utilization: is vLLM's; leave it out, and give server.options what you wish"
        if "min_new_tokens" in shaped:
            return "min_new_tokens: llama.cpp's server knows no least length; leave it at 0"
    if server.url is not None:
        if given := [key for key in ("command", "options", "devices") if getattr(server, key) is not None]:
            return f"server.{given[0]}: is of a server that is started, and server.url names one that runs; give one"
        try:  # where a name leads, and whether there is a key, is looked at by the run that needs it
            address_of(server.url, "/v1", None, True, "", EXAMPLE)
        except ValueError as error:
            return f"server.{error}"
    elif server.api_key_env is not None:
        return "server.api_key_env: is of a server that runs; give server.url, or leave it out"
    return None


def shares_card(server: ServerConfig | None) -> bool:
    """Whether a server takes memory of the card that trains: one that sleeps, or is started and told no other card."""
    server = server or ServerConfig()
    return server.sleep or (server.url is None and server.devices is None)
