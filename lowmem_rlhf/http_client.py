"""Requests to a server that the user names, over the standard library's HTTP alone: no proxy, no redirect.

Nothing that a server does makes a request last longer than its time, or read more than its share of bytes.
"""

import http.client
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

from lowmem_rlhf.parallel import Ending

_SHOWN = 160  # characters of what a server says


class Unanswered(Exception):
    """A request has no reply; the message says why."""


class NotReached(Unanswered):
    """There was no connection at all."""


class NotPrivate(Unanswered):
    """The name means an address where nothing may be sent to."""


class BrokenOff(Unanswered):
    """The connection ended before the reply did."""


class TooSlow(Unanswered):
    """The reply did not come in time."""


class TooLarge(Unanswered):
    """The reply has more bytes than may be read."""


@dataclass(frozen=True)
class Reply:
    """What a server answered; `content` is whole."""

    status: int
    headers: Message
    content: bytes


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        url: as the user gave it, for messages.
        path: that all paths begin with, without a slash at its end.
        key: the environment variable that holds the API key; None: there is none.
        remote: whether it may be an address that is neither of this computer nor private.
    """

    url: str
    secure: bool
    host: str
    port: int
    path: str
    key: str | None
    remote: bool

    def exchange(
        self, method: str, path: str, body: bytes | None, timeout: float, most_bytes: int, ending: Ending
    ) -> Reply:
        """Return the reply to one request.

        Args:
            path: below the address's own.
            body: JSON; None: there is none.
            timeout: seconds for all of it.
            most_bytes: of the reply.
            ending: ends the request before its time.

        Raises:
            Unanswered: there is none, in the form that says why.
        """
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=timeout)
        began = time.monotonic()
        try:
            try:
                connection.connect()
            except OSError as error:
                raise NotReached(f"{self.url} cannot be reached: {error.strerror or error}") from None
            self._check_peer(connection.sock)
            connection.sock.settimeout(None)  # one clock alone, that of the whole request: two would be a race
            with _ended_by(connection.sock, began + timeout, ending) as over:
                try:
                    connection.request(method, self.path + path, body, self._headers(body))
                    response = connection.getresponse()
                    content = response.read(most_bytes + 1)
                except (OSError, http.client.HTTPException) as error:
                    if not over.is_set():
                        raise BrokenOff(f"{self.url} broke the connection off: {type(error).__name__}") from None
                if over.is_set():
                    raise TooSlow(f"{self.url} did not answer within {timeout:g} seconds")
            if len(content) > most_bytes and response.status == 200:
                raise TooLarge(f"{self.url} answered with more than {most_bytes} bytes")
            if response.length and len(content) <= most_bytes:  # `read` itself says nothing of it
                raise BrokenOff(f"{self.url} broke the connection off: IncompleteRead")
            return Reply(response.status, response.headers, content)
        finally:
            connection.close()

    def said(self, reply: Reply) -> str:
        """Return the beginning of what a reply says, on one line in brackets, without the key; '' of an empty one."""
        text = " ".join(reply.content.decode(errors="replace").split()).replace(self._secret() or "\0", "***")[:_SHOWN]
        return f" ({text})" if text else ""

    def _headers(self, body: bytes | None) -> dict[str, str]:
        key = {} if self.key is None else {"Authorization": f"Bearer {self._secret()}"}
        kind = {} if body is None else {"Content-Type": "application/json"}
        return {**kind, "Connection": "close", **key}

    def _secret(self) -> str:
        return "" if self.key is None else os.environ.get(self.key, "").strip()

    def _check_peer(self, connection: socket.socket) -> None:
        address = connection.getpeername()[0]
        if not self.remote and not is_local(address):  # a name can mean another address than when it was checked
            raise NotPrivate(f"{self.url} is at {address}, which is not a private address; set allow_remote: true")


def address_of(url: str, ending: str, key: str | None, remote: bool, what: str, example: str) -> Address:
    """Return the address that options describe.

    Args:
        url: http or https.
        ending: of its path, which may be there or not.
        key: the environment variable that holds the API key.
        remote: whether it may be an address that is neither of this computer nor private.
        what: would be sent there.
        example: of such an address, for messages.

    Raises:
        ValueError: one of them cannot be; the message begins with its name.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"url: got {url!r}, which is no address ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ValueError(f"url: got {url!r}; give {example}")
    if not remote and (away := _remote_address(parts.hostname)) is not None:
        raise ValueError(
            f"url: {away} is neither of this computer nor private, and {what} would go there; set allow_remote: true "
            "if they may"
        )
    if key is not None and not key.isidentifier():  # it is not repeated: it may be the key itself
        raise ValueError("api_key_env: is no name of an environment variable; give the name, and not the key")
    if key is not None and not (os.environ.get(key, "").strip().isascii() and os.environ.get(key, "").strip()):
        raise ValueError("api_key_env: names an environment variable that is not set (or is no key); set it")
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix(ending)
    return Address(url, secure, parts.hostname, port or (443 if secure else 80), path, key, remote)


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
