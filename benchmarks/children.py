"""A benchmark's child process and the line it is led by: commands go in, one JSON object comes out for each."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any


class Channel:
    """A child's end of the pipes."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not come between
        warnings.filterwarnings("ignore")

    def ready(self, **settings: Any) -> None:
        """Tell the parent that the child is loaded, and with what settings."""
        import torch

        self.send(settings={**settings, "threads": torch.get_num_threads()})

    def send(self, **message: Any) -> None:
        """Answer the last command."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def command(self) -> str:
        """Wait for the next command.

        Raises:
            SystemExit: the parent has closed its end, or is no more.
        """
        line = sys.stdin.readline().strip()
        if not line:
            raise SystemExit("the parent process has ended")
        return line


class Child:
    """The parent's end: a process that answers commands.

    Args:
        name: for error messages.
        command: a script and its arguments.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen([sys.executable, *command], text=True, **pipes)

    def answer(self) -> dict[str, Any]:
        """Wait for the child's next message.

        Raises:
            SystemExit: the child has ended; its last words are the message.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"{self.name} failed:\n{self._log.read()[-4000:]}")
        return json.loads(line)

    def take(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Let the child end, and wait for it."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()
