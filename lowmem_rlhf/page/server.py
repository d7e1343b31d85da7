"""The server of the page: this machine only, a token in its address, and nothing is written.

Who may ask is checked before anything else. The address is that of the loopback interface; the Host header must be one
of its names, so that a web site whose name leads here (DNS rebinding) gets nothing; and a token that only the printed
address has comes with every question, as a header that no other site's page can send.
"""

import hmac
import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lowmem_rlhf.errors import RunError, UserError, one_line
from lowmem_rlhf.hardware.gauges import Gauge, gauges
from lowmem_rlhf.page.answers import answer, talk
from lowmem_rlhf.page.chat import Chat
from lowmem_rlhf.page.followed import Followed
from lowmem_rlhf.page.lines import Missing
from lowmem_rlhf.page.source import shown
from lowmem_rlhf.stopping import exit_code, only_interrupted

LOOPBACK = "127.0.0.1"
_NAMES = ("127.0.0.1", "localhost", "::1")
_LARGEST_BODY = 256 * 1024
_IDLE = 60.0  # seconds after which a connection without a question is closed
_JSON, _HTML, _TEXT = "application/json", "text/html; charset=utf-8", "text/plain; charset=utf-8"
_ICON = "/favicon.ico"  # browsers ask for it by themselves; there is none

Page = Callable[[None, str], tuple[str, str]]  # (no data, token) -> page, its content security policy


class Refused(Exception):
    """A question that is not answered, with the HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class PageServer(ThreadingHTTPServer):
    """Answers until `shutdown`; each connection has its thread.

    Args:
        followed, chat: what is shown, and what answers.
        port: 0 for a free one.
        page: `html.whole_page`.

    Raises:
        UserError: the port is not to be had.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it would share a port that another program has

    def __init__(self, followed: Followed, chat: Chat, port: int = 0, page: Page | None = None) -> None:
        self.followed, self.chat, self.page = followed, chat, page or _whole_page
        self.token = secrets.token_urlsafe(24)
        self._gauges: list[Gauge] | None = None
        self._gauges_lock = Lock()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            why = error.strerror or error
            raise UserError(
                f"--port: {port} cannot be had ({why}); give another one, or leave it out for one that is free"
            ) from error

    @property
    def address(self) -> str:
        """What the user opens."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/?token={self.token}"

    def admits(self, token: str) -> bool:
        """Whether it is the token of this server; the time that it takes says nothing of how much of it is right."""
        return hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode())

    def cards(self) -> dict[str, Any]:
        """Return what the cards do now; ``now`` is an empty list where NVML cannot be asked."""
        with self._gauges_lock:
            if self._gauges is None:
                self._gauges = gauges()
            return {"now": [gauge.to_dict() for gauge in self._gauges]}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that broke."""


def _whole_page(data: None, token: str) -> tuple[str, str]:
    from lowmem_rlhf.page.html import whole_page

    return whole_page(data, token)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = _IDLE
    _read_whole = False  # the body of the question that is answered

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _other(self) -> None:
        self._answer(self._refuse_method)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _other

    def _answer(self, work: Callable[[str, str], tuple[Any, ...]]) -> None:
        """Send what a question is answered, or one sentence why it is not."""
        try:
            address = self._checked()
            sent = (204, _TEXT, b"") if address.path == _ICON else work(address.path, address.query)
        except Refused as error:
            sent = self._sentence(error.status, str(error))
        except Missing as error:
            sent = self._sentence(404, str(error))
        except UserError as error:
            sent = self._sentence(400, str(error))
        except RunError as error:
            sent = self._sentence(500, str(error))
        except Exception as error:
            sent = self._sentence(500, f"this could not be answered ({type(error).__name__}: {one_line(error)})")
        self._send(*sent)

    def _checked(self) -> Any:
        """Return the address asked for, once it is sure that the question may be answered.

        Raises:
            Refused: it may not.
        """
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or _host_name(hosts[0]) not in _NAMES:
            raise Refused(403, "this page answers on this machine's own address only; open the one that was printed")
        try:
            address = urlsplit(self.path)
        except ValueError as error:
            raise Refused(400, "the address cannot be read") from error
        if not self.path.startswith("/"):
            raise Refused(400, "the address should begin with /")
        given = self.headers.get("X-Token", "")
        if address.path == "/":
            given = parse_qs(address.query).get("token", [""])[0]
        if address.path != _ICON and not self.server.admits(given):
            raise Refused(403, "the token is missing or wrong; open the whole address that `lowmem-rlhf watch` printed")
        return address

    def _get(self, path: str, query: str) -> tuple[Any, ...]:
        if path == "/":
            page, policy = self.server.page(None, self.server.token)
            return 200, _HTML, page.encode("utf-8", "replace"), {"Content-Security-Policy": policy}
        if path == "/api/gpu":
            return 200, _JSON, _encoded(self.server.cards())
        return 200, _JSON, _encoded(answer(self.server.followed, path, query))

    def _post(self, path: str, query: str) -> tuple[Any, ...]:
        return 200, _JSON, _encoded(talk(self.server.followed, self.server.chat, path, self._body()))

    def _refuse_method(self, path: str, query: str) -> tuple[Any, ...]:
        raise Refused(405, f"{self.command} is not answered; GET reads, and POST is for chat")

    def _body(self) -> Any:
        """Return the JSON value that was posted.

        Raises:
            Refused: it is too long, of unknown length or no JSON.
        """
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise Refused(411, "the length of the body is not given")
        if len(length) > 15:  # int() takes no number of any length
            raise Refused(413, f"the body is too long; at most {_LARGEST_BODY:,} bytes are taken")
        if int(length) > _LARGEST_BODY:
            raise Refused(413, f"the body has {int(length):,} bytes; at most {_LARGEST_BODY:,} are taken")
        body = self.rfile.read(int(length))
        self._read_whole = True
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not JSON") from error

    def _sentence(self, status: int, sentence: str) -> tuple[Any, ...]:
        if status in (403, 404) and self.command == "GET" and not self.path.startswith("/api/"):
            return status, _TEXT, (shown(sentence) + "\n").encode("utf-8", "replace")
        return status, _JSON, _encoded({"error": shown(sentence)})

    def _send(self, status: int, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        sent = getattr(self, "headers", None) or {}
        has_body = self.command not in ("GET", "HEAD") or "Content-Length" in sent or "Transfer-Encoding" in sent
        if has_body and not self._read_whole:
            self.close_connection = True  # what was not read of a body would be taken for the next question
        self._read_whole = False
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",  # the address has the token
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            **({"Connection": "close"} if self.close_connection else {}),
            **(more or {}),
        }
        with suppress(ConnectionError, TimeoutError):  # nobody waits for it any more
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no HTTP that this server speaks."""
        self.close_connection = True
        self.command = getattr(self, "command", None) or "GET"
        self._send(int(code), _JSON, _encoded({"error": message or "this is no question that can be answered"}))

    def version_string(self) -> str:
        """Name the server, and no version."""
        return "lowmem-rlhf"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _encoded(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def watch(
    names: list[str], port: int | None, opens: bool, open_run: Callable[[Any], Any], say: Callable[[str], None]
) -> None:
    """Serve the page of some runs until it is interrupted, and say its address.

    Args:
        names: as of `Followed.named`.
        port: None for a free one.
        opens: a browser, too.
        open_run: `api.run.open_run`, with which a chat begins.
        say: tells the user a line.

    Raises:
        UserError: there is no such run, or the port is not to be had.
        KeyboardInterrupt: it was stopped by another signal than Ctrl-C.
    """
    followed = Followed.named(names)
    chat = Chat(open_run, followed)
    with PageServer(followed, chat, port or 0) as server:
        count = len(followed.all())
        runs = "no run yet; those that begin appear" if not count else f"{count} run{'s' if count > 1 else ''}"
        say(server.address)
        say(f"{runs}; Ctrl-C ends the page")
        if opens:
            _open_browser(server.address, say)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt as stop:
            by_hand = only_interrupted(stop)
            _leave(chat, 0 if by_hand else exit_code(stop))
            if not by_hand:
                raise


def _open_browser(address: str, say: Callable[[str], None]) -> None:
    import webbrowser

    if not webbrowser.open(address):
        say("no browser could be opened; open the address by hand")


def _leave(chat: Chat, code: int) -> None:
    """End the process at once where it holds a model: there is nothing to keep, and tearing it down takes seconds."""
    if chat.holds_model:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)
