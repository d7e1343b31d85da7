"""One writer at a time: a lock of the operating system on a file, which ends with the process that holds it.

The file stays and holds who has (or had) the lock; one that a dead process left is no obstacle. On POSIX the lock is
``flock``'s: it belongs to this opening of the file, so a second one of the same process is refused too. The other kind,
``lockf``'s, is not used: it belongs to the process, which would refuse itself nothing, and would end whenever any other
opening of the file is closed. Over NFS, Linux turns ``flock`` into a byte-range lock of the server, for which the file
must be open for writing, as it is here. A file system without locks gives none, which is said once. No torch here.
"""

import errno
import gc
import json
import os
import socket
import sys
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.progress import message

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_LOOK = 0.05  # seconds, in which somebody who only looks at a lock is done
_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK, errno.EWOULDBLOCK}


class Lock:
    """A lock on a file, released by `release` and at the latest with this object or the process.

    Args:
        file: the lock's own file.
        what: that it guards, as the user is to read it, for example "the run in runs/a".
    """

    def __init__(self, file: Path, what: str) -> None:
        self.file, self.what = file, what
        self._mine = ""  # what this object wrote into the file
        self._release: weakref.finalize[..., Any] | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._release is not None and self._release.alive

    def acquire(self) -> None:
        """Take the lock, if it is not held already.

        Raises:
            UserError: another process, or another object of this one, holds it or has held it since this object did.
            OSError: the file cannot be written.
        """
        if self.held:
            return
        descriptor = self._locked()
        try:
            if self._mine and _content(self.file).get("id") != self._mine:
                raise UserError(
                    f"{self.what} went on elsewhere since this one stopped ({_holder(self.file)}); open it anew"
                )
            self._mine = uuid.uuid4().hex
            began = datetime.now(UTC).isoformat(timespec="seconds")
            who = {"pid": os.getpid(), "host": socket.gethostname(), "started": began, "id": self._mine}
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, (json.dumps(who) + "\n").encode())
        except BaseException:
            _close(descriptor)
            raise
        self._release = weakref.finalize(self, _close_of, os.getpid(), descriptor)

    def release(self) -> None:
        """Give the lock back, if it is held; the file stays."""
        if self._release is not None:
            self._release()

    def remove(self) -> None:
        """Give the lock back and remove its file."""
        if self.held and os.name != "nt":  # while it is held: nobody else can have it then
            with suppress(OSError):
                self.file.unlink()
        self.release()
        if os.name == "nt":
            with suppress(OSError):
                self.file.unlink()

    def check(self) -> None:
        """Check that the lock is free, or held by this object; writes nothing, and the file need only be readable.

        Raises:
            UserError: it is not.
        """
        if not self.held and self.file.is_file():
            with suppress(OSError):
                _close(self._locked(os.O_RDONLY, shared=True))  # others may look at the same time

    def _locked(self, flags: int = os.O_RDWR | os.O_CREAT, shared: bool = False) -> int:
        """Return the file's descriptor with the lock on it."""
        for _ in range(100):
            descriptor = os.open(self.file, flags, 0o666)
            try:
                if not _lock(descriptor, shared=shared):
                    if _content(self.file).get("pid") == os.getpid():
                        gc.collect()  # an object that nobody has any more may hold it
                    elif not shared:
                        time.sleep(_LOOK)
                    if not _lock(descriptor, shared=shared):
                        raise UserError(f"{self.what} is being written by {_holder(self.file)}; wait for its end")
                with suppress(FileNotFoundError):
                    if os.name == "nt" or _same(descriptor, self.file):
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # removed by whoever had it: the lock of a file that is gone is worth nothing
        raise UserError(f"{self.what} is being written by {_holder(self.file)}; wait for its end")


def _same(descriptor: int, file: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), file.stat())


def _content(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _holder(file: Path) -> str:
    """Return who holds a lock, in words."""
    values = _content(file)
    if not isinstance(pid := values.get("pid"), int):
        return "another process"
    host, mine = values.get("host"), socket.gethostname()
    if pid == os.getpid() and host == mine:
        return f"this process (pid {pid} on {host}, since {values.get('started')}: another Trainer, which close() ends)"
    who = f"pid {pid} on {host}, since {values.get('started')}"
    if host == mine and not psutil.pid_exists(pid):
        return f"a process that another one has left behind ({who}, which has ended itself)"
    return f"another process ({who})"


_PLACE = 1 << 30  # of the byte that is locked on Windows, where a locked part cannot be read by others

if sys.platform == "win32":
    import msvcrt

    def _system_lock(descriptor: int, wait: bool, shared: bool) -> None:
        os.lseek(descriptor, _PLACE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

    def _system_unlock(descriptor: int) -> None:
        os.lseek(descriptor, _PLACE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _system_lock(descriptor: int, wait: bool, shared: bool) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))

    def _system_unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a child has inherited it


_said: set[str] = set()


def _lock(descriptor: int, wait: bool = False, shared: bool = False) -> bool:
    """Lock an open file; return whether that worked, or there are no locks there."""
    try:
        _system_lock(descriptor, wait, shared)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        if "no locks" not in _said:
            _said.add("no locks")
            message(
                f"this file system has no locks ({error.strerror or error}): see to it yourself that only one process "
                "writes there"
            )
    return True


def _close_of(process: int, descriptor: int) -> None:
    """Close a lock's file in the process that took it: a child that ends must not give away what it has inherited."""
    if os.getpid() == process:
        _close(descriptor)


def _close(descriptor: int) -> None:
    with suppress(OSError):
        _system_unlock(descriptor)
    with suppress(OSError):
        os.close(descriptor)


@contextmanager
def one_at_a_time(file: Any) -> Iterator[None]:
    """Wait for the lock of an open file and hold it inside the block."""
    _lock(file.fileno(), wait=True)
    try:
        yield
    finally:
        with suppress(OSError):
            _system_unlock(file.fileno())
