"""Questions to an OpenAI-compatible chat endpoint, over the standard library's HTTP alone: no proxy, no redirect.

Nothing that a server does makes a request last longer than its time, or read more than its share of bytes.
"""

import http.client
import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lowmem_rlhf.rewards.parallel import Ending

_PATH = "/chat/completions"
_MOST_BYTES = 2**20  # of a reply
_SHOWN = 160  # characters of what a server says
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
        url: as the user gave it, for messages.
        path: of chat completions.
        key: the environment variable that holds the API key; None: there is none.
        timeout: seconds for one try.
        retries: further tries.
        remote: whether it may be an address that is neither of this computer nor private.
    """

    url: str
    secure: bool
    host: str
    port: int
    path: str
    key: str | None
    timeout: float
    retries: int
    remote: bool

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
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout)
        began = time.monotonic()
        try:
            try:
                connection.connect()
            except OSError as error:
                raise _Again(f"{self.url} cannot be reached: {error.strerror or error}", down=True) from None
            self._check_peer(connection.sock)
            connection.sock.settimeout(None)  # one clock alone, that of the whole try: two would be a race
            with _ended_by(connection.sock, began + self.timeout, ending) as over:
                try:
                    connection.request("POST", self.path, body, self._headers())
                    response = connection.getresponse()
                    content = response.read(_MOST_BYTES + 1)
                except (OSError, http.client.HTTPException) as error:
                    if not over.is_set():
                        raise _Again(f"{self.url} broke the connection off: {type(error).__name__}") from None
                if over.is_set():
                    raise RequestFailed(f"{self.url} did not answer within {self.timeout:g} seconds")
            if response.length and len(content) <= _MOST_BYTES:  # `read` itself says nothing of it
                raise _Again(f"{self.url} broke the connection off: IncompleteRead")
            return self._reply(response, content)
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        key = {} if self.key is None else {"Authorization": f"Bearer {self._secret()}"}
        return {"Content-Type": "application/json", "Connection": "close", **key}

    def _secret(self) -> str:
        return "" if self.key is None else os.environ.get(self.key, "").strip()

    def _check_peer(self, connection: socket.socket) -> None:
        address = connection.getpeername()[0]
        if not self.remote and not is_local(address):  # a name can mean another address than when it was checked
            raise NoServer(f"{self.url} is at {address}, which is not a private address; set allow_remote: true")

    def _reply(self, response: http.client.HTTPResponse, content: bytes) -> str:
        status = response.status
        if status == 429 or status >= 500:
            with suppress(ValueError):
                wait = min(max(float(response.headers.get("Retry-After") or 0), 0.0), _LONGEST_ASKED)
                raise _Again(f"{self.url} answered with status {status}", wait)
            raise _Again(f"{self.url} answered with status {status}")
        if status != 200:
            said = " ".join(content.decode(errors="replace").split()).replace(self._secret() or "\0", "***")[:_SHOWN]
            what = f"{self.url} answered with status {status}{said and f' ({said})'}"
            if status in _OF_ONE_REQUEST:
                raise RequestFailed(what)
            raise NoServer(f"{what}; {_REMEDIES.get(status, 'mend url')}")
        if len(content) > _MOST_BYTES:
            raise RequestFailed(f"{self.url} answered with more than {_MOST_BYTES} bytes")
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
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
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"url: got {url!r}, which is no address ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ValueError(f"url: got {url!r}; give the address that ends in /v1, such as http://127.0.0.1:8000/v1")
    if not remote and (away := _remote_address(parts.hostname)) is not None:
        raise ValueError(
            f"url: {away} is neither of this computer nor private, and prompts and completions would go there; set "
            "allow_remote: true if they may"
        )
    if key is not None and not key.isidentifier():  # it is not repeated: it may be the key itself
        raise ValueError("api_key_env: is no name of an environment variable; give the name, and not the key")
    if key is not None and not (os.environ.get(key, "").strip().isascii() and os.environ.get(key, "").strip()):
        raise ValueError("api_key_env: names an environment variable that is not set (or is no key); set it")
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix(_PATH) + _PATH
    return Endpoint(url, secure, parts.hostname, port or (443 if secure else 80), path, key, timeout, retries, remote)


def is_local(address: str) -> bool:
    """Whether an IP address is of this computer or of a private network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return not (mapped or ip).is_global


def _remote_address(host: str) -> str | None:
    """Return an address of a host that is not local; None where all that is known of it is."""
    try:
        return None if is_local(host) else host
    except ValueError:  # a name
        pass
    with suppress(OSError, UnicodeError):  # one that is not known now is looked at when it is connected
        for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            if not is_local(str(address[0])):
                return host
    return None


@contextmanager
def _ended_by(connection: socket.socket, end: float, ending: Ending) -> Iterator[threading.Event]:
    """End what reads a connection at a time, or where the run stops; the event says that it was."""
    over = threading.Event()

    def end_now() -> None:
        over.set()
        with suppress(OSError):  # not the method of a TLS socket, which would change it under its reader
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, end - time.monotonic()), end_now)
    timer.daemon = True
    timer.start()
    try:
        with ending.by(end_now):
            yield over
    finally:
        timer.cancel()
