"""A server that is started beside the run, and ends with it, whatever ends the run."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowmem_rlhf.rollout.server.client import Client, ServerFault

_TICK = 0.1  # seconds between looks at a server that starts
_PATIENCE = 10.0  # seconds in which it may end by itself
_SHOWN = 600  # characters of what it said last
# the server ends with this process, be it killed: on Linux the kernel sees to that
_STARTER = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except (OSError, AttributeError):
    pass
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def free_port() -> int:
    """Return a port of this computer that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class StartedServer:
    """A program with its output in a file.

    Args:
        command: the program and its arguments.
        more: environment variables beside ours.
        log: the file, which is begun anew.

    Raises:
        ServerFault: there is no such program.
    """

    def __init__(self, command: Sequence[str], more: Mapping[str, str], log: Path) -> None:
        self.command, self.log = list(command), log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _STARTER, str(os.getpid()), *command],
                env={**os.environ, **more},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours: the server ends once we have ended what we ask of it
            )
        self._end = weakref.finalize(self, _end, self.process)

    def wait(self, client: Client, path: str, seconds: float) -> None:
        """Wait until it answers.

        Raises:
            ServerFault: it ended, or did not answer in time.
        """
        until = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None:
                raise ServerFault(f"{self._name()} ended with code {self.process.returncode}{self.said()}")
            with contextlib.suppress(ServerFault):
                client.ask(path)
                return
            if time.monotonic() > until:
                self.stop()
                raise ServerFault(
                    f"{self._name()} did not answer within {seconds:g} seconds (generation.server.start_timeout)"
                    f"{self.said()}"
                )
            time.sleep(_TICK)

    def fault(self) -> str:
        """Return what became of it, where it has ended; '' while it runs."""
        if self.process.poll() is None:
            return ""
        return f"{self._name()} ended with code {self.process.returncode}{self.said()}"

    def said(self) -> str:
        """Return the last that it wrote, in a clause."""
        text = self.log.read_text(encoding="utf-8", errors="replace").strip() if self.log.is_file() else ""
        text = " | ".join(line.strip() for line in text[-_SHOWN:].splitlines()[-4:])
        return f"; it said last: {text}" if text else ""

    def stop(self) -> None:
        """End it."""
        self._end()

    def _name(self) -> str:
        return f"the server ({' '.join(self.command[:2])})"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
