"""A reward that asks another model: shipped, and made of its options as those of `texts` are."""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from lowmem_rlhf.data.row_template import fill_template, required_fields, template_fields
from lowmem_rlhf.data.values import is_missing, text_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.parallel import Ending, in_parallel
from lowmem_rlhf.rewards.chat_endpoint import Endpoint, NoServer, RequestFailed, endpoint
from lowmem_rlhf.rewards.guarded import FunctionFault

_URL = "http://127.0.0.1:8000/v1"
_SCALE = [0.0, 10.0]
_PROMPT = """Judge how good an answer is: whether it is right, helpful and does what was asked.

[Question]
{prompt}

[Answer]
{completion}

[End]
Say in a few sentences what is good and what is wrong. Then write on the last line: Score: N, with a number N from 0 (of
no use) to 10 (could not be better)."""
# The 8 of `8/10`; nothing of `8-10`, of a version or of a name
_NUMBER = re.compile(r"(?<![\w.-])(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\s*/\s*[0-9]+)?(?![\w/]|-[0-9])")
_MOST_KEPT = 100_000  # values in memory


def judge(
    *,
    model: str,
    url: str = _URL,
    prompt: str = _PROMPT,
    scale: list[float] = _SCALE,
    max_tokens: int = 512,
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 3,
    api_key_env: str | None = None,
    allow_remote: bool = False,
) -> "Judge":
    """The last number that a model behind an OpenAI-compatible chat endpoint replies, scaled from 0.0 to 1.0.

    Such endpoints are those of vLLM, llama.cpp, Ollama and others. The temperature is 0. Equal questions are asked once
    in a run. A reply without a number on the scale gives no value.

    Args:
        model: the name that the server knows it by.
        url: of the server, up to ``/v1``.
        prompt: what it is asked, with ``{prompt}``, ``{completion}`` and columns of the data; braces are written
            ``{{`` and ``}}``. A row without a column that it names has no value, unless that is written ``{column?}``.
        scale: the numbers that mean 0.0 and 1.0.
        max_tokens: of a reply.
        concurrency: requests at the same time.
        timeout: seconds for one request.
        retries: further tries after status 429 or 5xx, or where the connection fails.
        api_key_env: the environment variable with the server's key.
        allow_remote: let prompts and completions go to an address that is not private.

    Raises:
        ValueError: an option has a value that is not allowed.
    """
    try:
        fields = template_fields(prompt)
    except UserError as error:
        raise ValueError(f"prompt: {str(error).removeprefix('data.template: ')}") from error
    if "completion" not in fields:
        raise ValueError("prompt: has no place for the answer that is judged; write {completion}")
    if not model.strip():
        raise ValueError("model: got ''; give the name that the server knows the model by")
    if len(scale) != 2 or scale[0] == scale[1]:
        raise ValueError(f"scale: got {scale!r}; give the two numbers that mean 0.0 and 1.0, such as [0, 10]")
    for name, number, most in (("max_tokens", max_tokens, 2**20), ("concurrency", concurrency, 256)):
        if not 1 <= number <= most:
            raise ValueError(f"{name}: got {number}; give a whole number from 1 to {most}")
    if not 0 < timeout <= 3600:
        raise ValueError(f"timeout: got {timeout:g}; give a number of seconds above 0 and up to 3600")
    if not 0 <= retries <= 100:
        raise ValueError(f"retries: got {retries}; give a whole number from 0 to 100")
    server = endpoint(url, api_key_env, timeout, retries, allow_remote)
    return Judge(server, {"model": model, "temperature": 0, "max_tokens": max_tokens}, prompt, scale, concurrency)


class Judge:
    """The reward, with the values of the questions that were asked in this run."""

    def __init__(
        self, server: Endpoint, request: dict[str, Any], template: str, scale: list[float], concurrency: int
    ) -> None:
        self.server, self.request, self.template, self.concurrency = server, request, template, concurrency
        self.low, self.high = scale
        self.fields = template_fields(template)
        self.columns = tuple(name for name in required_fields(template) if name not in ("prompt", "completion"))
        self._known: dict[bytes, float | None] = {}

    def __call__(
        self,
        texts: Sequence[str],
        prompts: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | FunctionFault | None]:
        """Return a value for each completion; a fault where its question has no answer."""
        questions = [self._question(place, text, prompts, columns) for place, text in enumerate(texts)]
        keys = {
            one: hashlib.sha256(one.encode("utf-8", "surrogatepass")).digest() for one in questions if one is not None
        }
        new = [one for one, key in keys.items() if key not in self._known]
        asked = dict(zip(new, self._asked(new), strict=True))
        values = {one: asked[one] if one in asked else self._known[key] for one, key in keys.items()}
        for one, value in asked.items():
            if not isinstance(value, FunctionFault):
                self._known[keys[one]] = value
        while len(self._known) > _MOST_KEPT:
            del self._known[next(iter(self._known))]
        if log_metric is not None:
            log_metric("judge/no_number", sum(one is not None and values[one] is None for one in questions))
        return [None if one is None else values[one] for one in questions]

    def _question(self, place: int, text: str, prompts: Sequence[Any], columns: dict[str, Any]) -> str | None:
        """Return what is asked of a completion; None where its row lacks something."""
        given = {name: columns[name][place] for name in self.fields if name in columns}
        named = {name: "" if is_missing(value) else text_of(value) for name, value in given.items()}
        if not all(named.get(name, "").strip() for name in self.columns):
            return None
        own = {"prompt": _prompt_text(prompts[place]), "completion": text.rpartition("</think>")[2].strip()}
        return fill_template(self.template, {**named, **own})

    def _asked(self, questions: Sequence[str]) -> list[float | FunctionFault | None]:
        gone: list[str] = []

        def ask(question: str, ending: Ending) -> float | FunctionFault | None:
            if gone:
                return FunctionFault(gone[0])
            try:
                message = {"role": "user", "content": question}
                return self._value(self.server.ask({**self.request, "messages": [message]}, ending))
            except RequestFailed as error:
                if isinstance(error, NoServer):
                    gone.append(str(error))
                return FunctionFault(str(error))

        return in_parallel(ask, questions, self.concurrency)

    def _value(self, reply: str) -> float | None:
        if "<think>" in reply and "</think>" not in reply:  # it was cut off before it came to its answer
            return None
        numbers = _NUMBER.findall(reply.rpartition("</think>")[2])
        if not numbers:
            return None
        share = (float(numbers[-1]) - self.low) / (self.high - self.low)
        return share if 0 <= share <= 1 else None


def _prompt_text(prompt: Any) -> str:
    """Return a prompt as a text: of one message its content, of several each with its role."""
    if isinstance(prompt, str):
        return prompt
    contents = [text_of(message.get("content") or "") for message in prompt]
    if len(contents) == 1:
        return contents[0]
    return "\n\n".join(f"{message['role']}: {content}" for message, content in zip(prompt, contents, strict=True))
