"""Questions to an OpenAI-compatible chat endpoint, each with a few tries."""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.http_client import (
    Address,
    BrokenOff,
    NotPrivate,
    NotReached,
    Reply,
    Unanswered,
    address_of,
)
from lowmem_rlhf.parallel import Ending

_PATH = "/chat/completions"
_MOST_BYTES = 2**20  # of a reply
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds before the next try, doubled each time
_LONGEST_ASKED = 30.0  # seconds that a server may ask to wait (Retry-After)
_REMEDIES = {401: "name its key in api_key_env", 403: "name its key in api_key_env", 404: "mend url or model"}
_OF_ONE_REQUEST = (400, 413, 422)  # a question that is too long, for example


class RequestFailed(Exception):
    """A question has no answer; the message says why."""


class NoServer(RequestFailed):
    """No question would have one: nothing listens at the address, or it knows no such path, model or key."""


class _Again(Exception):
    """Another try may help.

    Attributes:
        wait: seconds that the server asks for.
        down: whether there was no connection at all.
    """

    def __init__(self, why: str, wait: float = 0.0, down: bool = False) -> None:
        super().__init__(why)
        self.wait, self.down = wait, down


@dataclass(frozen=True)
class Endpoint:
    """An endpoint.

    Attributes:
        address: where it is; chat completions lie below.
        timeout: seconds for one try.
        retries: further tries.
    """

    address: Address
    timeout: float
    retries: int

    @property
    def url(self) -> str:
        """As the user gave it, for messages."""
        return self.address.url

    def ask(self, question: dict[str, Any], ending: Ending) -> str:
        """Return the text of a reply.

        Args:
            question: the body of a request.

        Raises:
            RequestFailed: there is none; NoServer where there would be none to others either.
        """
        body = json.dumps(question).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._once(body, ending)
            except _Again as error:
                if attempt == self.retries:
                    tries = f" ({attempt + 1} tries)" if attempt else ""
                    if error.down:
                        raise NoServer(f"{error}{tries}; start the server, or mend url") from None
                    raise RequestFailed(f"{error}{tries}") from None
                wait = max(error.wait, min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT))
            if ending.begun.wait(wait):
                break
        raise RequestFailed("the run was stopped")

    def _once(self, body: bytes, ending: Ending) -> str:
        """Return the reply of one try.

        Raises:
            _Again: it failed in a way that another try may not.
            RequestFailed, NoServer: as of `ask`.
        """
        try:
            return self._text(self.address.exchange("POST", _PATH, body, self.timeout, _MOST_BYTES, ending))
        except NotPrivate as error:
            raise NoServer(str(error)) from None
        except (NotReached, BrokenOff) as error:
            raise _Again(str(error), down=isinstance(error, NotReached)) from None
        except Unanswered as error:
            raise RequestFailed(str(error)) from None

    def _text(self, reply: Reply) -> str:
        status = reply.status
        if status == 429 or status >= 500:
            with suppress(ValueError):
                wait = min(max(float(reply.headers.get("Retry-After") or 0), 0.0), _LONGEST_ASKED)
                raise _Again(f"{self.url} answered with status {status}", wait)
            raise _Again(f"{self.url} answered with status {status}")
        if status != 200:
            what = f"{self.url} answered with status {status}{self.address.said(reply)}"
            if status in _OF_ONE_REQUEST:
                raise RequestFailed(what)
            raise NoServer(f"{what}; {_REMEDIES.get(status, 'mend url')}")
        try:
            text = json.loads(reply.content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = 0
        if text is not None and not isinstance(text, str):
            raise RequestFailed(f"{self.url} answered with something that is no chat completion")
        return text or ""


def endpoint(url: str, key: str | None, timeout: float, retries: int, remote: bool) -> Endpoint:
    """Return the endpoint that options describe.

    Raises:
        ValueError: one of them cannot be; the message begins with its name.
    """
    example = "the address that ends in /v1, such as http://127.0.0.1:8000/v1"
    return Endpoint(address_of(url, _PATH, key, remote, "prompts and completions", example), timeout, retries)
