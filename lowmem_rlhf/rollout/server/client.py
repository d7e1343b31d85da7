"""JSON over HTTP with one server, every fault of it a sentence."""

import json
import math
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.http_client import Address, NotReached, Reply, Unanswered
from lowmem_rlhf.parallel import Ending

MOST_BYTES = 2**28  # of a reply: some hundred bytes for each token


class ServerFault(Exception):
    """A server does not do what is asked of it; the message says what and what to do.

    Attributes:
        status: what it answered with; None: it did not answer.
    """

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Client:
    """Asks a server.

    Attributes:
        address: where it is.
        timeout: seconds for one request.
    """

    address: Address
    timeout: float

    def ask(
        self, path: str, body: dict[str, Any] | None = None, ending: Ending | None = None, post: bool = False
    ) -> Any:
        """Return what the server answers, read as JSON; None of an empty answer, a text of one that is no JSON.

        Args:
            body: of a POST request; None: it is a GET, or a POST without a body where ``post`` says so.

        Raises:
            ServerFault: it does not answer, or with another status than 200.
        """
        data = None if body is None else json.dumps(body).encode()
        method = "GET" if data is None and not post else "POST"
        try:
            reply = self.address.exchange(method, path, data, self.timeout, MOST_BYTES, ending or Ending())
        except NotReached as error:
            raise ServerFault(f"{error}; start the server, or mend generation.server.url") from None
        except Unanswered as error:
            raise ServerFault(str(error)) from None
        if reply.status != 200:
            raise ServerFault(f"{self._url(path)} answered with status {reply.status}{self._said(reply)}", reply.status)
        return _read(reply.content)

    def object(self, path: str, body: dict[str, Any] | None = None, ending: Ending | None = None) -> dict[str, Any]:
        """Return an answer that has to be a JSON object.

        Raises:
            ServerFault: it is none, or see `ask`.
        """
        found = self.ask(path, body, ending)
        if not isinstance(found, dict):
            raise ServerFault(f"{self._url(path)} answered with something that is no JSON object")
        return found

    def _url(self, path: str) -> str:
        return self.address.url.rstrip("/").removesuffix("/v1") + path.partition("?")[0]

    def _said(self, reply: Reply) -> str:
        """Return the server's own message, as vLLM and llama.cpp write it, else the beginning of what it says."""
        found = _read(reply.content)
        error = found.get("error") if isinstance(found, dict) else None
        text = error.get("message") if isinstance(error, dict) else None
        return f" ({' '.join(text.split())[:400]})" if isinstance(text, str) else self.address.said(reply)


def _read(content: bytes) -> Any:
    if not content.strip():
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content.decode(errors="replace")


def list_of(found: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether this is a list that holds nothing else."""
    return isinstance(found, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in found)


@dataclass(frozen=True)
class Written:
    """A completion as a server gives it.

    Attributes:
        ids: its tokens, the stop token included.
        logps: their log-probs.
        cut: it ended at its length.
    """

    ids: list[int]
    logps: list[float]
    cut: bool


def written(ids: Any, logps: Any, cut: bool, vocabulary: int, url: str) -> Written:
    """Return a completion whose tokens and log-probs have been looked at.

    Args:
        vocabulary: ids are below it.

    Raises:
        ServerFault: they are missing, or not what they have to be.
    """
    if not list_of(ids, int) or not ids:
        raise ServerFault(f"{url} answered without the token ids of a completion")
    if not list_of(logps, (int, float)) or len(logps) != len(ids):
        raise ServerFault(f"{url} answered without a log-prob for each token of a completion")
    if not all(0 <= one < vocabulary for one in ids):
        bad = next(one for one in ids if not 0 <= one < vocabulary)
        raise ServerFault(f"{url} wrote the token {bad}, where our base has {vocabulary}: it has another base")
    if not all(math.isfinite(one) and one > -9000 for one in logps):  # vLLM writes -9999 for minus infinity
        raise ServerFault(f"{url} answered with log-probs that are not finite: its logits are not")
    return Written([int(one) for one in ids], [float(one) for one in logps], cut)
