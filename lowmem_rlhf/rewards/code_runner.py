"""The program in which `code_tests` runs one completion: a script of the standard library alone, started anew for each.

It reads a job (as `marshal` writes it) from its standard input and writes to its standard output whether it has
namespaces of its own, and which tests passed: ``1 101``. Three generations of processes: the first one makes
namespaces, where the system lets it, and waits; the supervisor keeps the time, judges and ends what is left; each test
runs in a process of its own, with limits. The supervisor ends them all when the pipe whose number is the argument is
closed or written to, as it is where the run stops or dies. Little is imported, as most of the time is Python's start.

A test that is a text has passed when its process gives back a random number that it is sent after the last line of the
test, so that neither an early exit nor anything printed counts. A case (a pair of texts) has passed when the code, run
as a program that reads the first text, has printed the second one and ended without an error.
"""

import builtins
import ctypes
import marshal
import os
import resource
import select
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

_LINUX = sys.platform == "linux"
_NAMESPACES = 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC
_NEW_USER = 0x10000000
_PDEATHSIG, _DUMPABLE, _CHILD_SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 36, 38  # of prctl(2)
_CAPABILITIES = 0x20080522  # the version of capset(2)'s structures
_FILE_BYTES = 16 * 2**20
_PRINTED_BYTES = 2**20  # that a program may print beyond what it should
_OPEN_FILES, _PROCESSES = 256, 64
_READY, _DONE = b"r", b"d"
_NONCE = 16  # bytes
_SIGKILL = 9
_ROUNDS = 400  # of looking for processes that are left, 5 ms each

_libc = ctypes.CDLL(None, use_errno=True) if _LINUX else None


def main() -> None:
    """Run a job."""
    job, life = marshal.load(sys.stdin.buffer), int(sys.argv[1])
    isolated = _own_namespaces()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            _supervise(job, life, isolated)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        os._exit(0)
    os.waitpid(supervisor, 0)


def _own_namespaces() -> bool:
    """Give the children namespaces of their own for processes, network and IPC; return whether the system lets us."""
    if _libc is None:
        return False
    user, group = os.geteuid(), os.getegid()
    if _libc.unshare(_NEW_USER | _NAMESPACES) != 0:
        return user == 0 and _libc.unshare(_NAMESPACES) == 0
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _supervise(job: dict[str, Any], life: int, isolated: bool) -> None:
    if _libc is not None:
        _libc.prctl(_PDEATHSIG, _SIGKILL)
        _libc.prctl(_CHILD_SUBREAPER, 1)  # what outlives its parent becomes a child of this process
        _libc.prctl(_DUMPABLE, 0)  # its memory and open files are not for others of the same user
    tests, passed = list(job.pop("tests")), []
    end = time.monotonic() + job["seconds"]
    for place in range(len(tests)):
        passes = _passes if isinstance(tests[place], str) else _prints
        passed.append(passes(job, tests, place, life, end, isolated))
        if not passed[-1] and job["all"]:
            break
    os.write(1, (f"{isolated:d} " + "".join(f"{one:d}" for one in passed)).encode())


def _passes(job: dict[str, Any], tests: list[str], place: int, life: int, end: float, isolated: bool) -> bool:
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    test, child = tests[place].encode("utf-8", "surrogatepass"), os.fork()
    if child == 0:
        try:
            tests.clear()  # the code under test need not know them
            del test
            _limit(job, (its_in, its_out), isolated)
            _execute(job["setup"], job["code"], its_in, its_out)
        finally:
            os._exit(1)
    os.close(its_in)
    os.close(its_out)
    try:
        return _judged(_Channel(our_in, our_out, life, end), test)
    finally:
        os.close(our_in)
        os.close(our_out)
        _end(child, isolated)


def _prints(job: dict[str, Any], tests: list[Any], place: int, life: int, end: float, isolated: bool) -> bool:
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    given, wanted = (text.encode("utf-8", "surrogatepass") for text in tests[place])
    child = os.fork()
    if child == 0:
        try:
            tests.clear()  # the code under test need not know them
            del given, wanted
            _limit(job, (its_in, its_out), isolated)
            for kept, number in ((its_in, 0), (its_out, 1)):
                os.dup2(kept, number)
                os.close(kept)
            _execute_program(job["setup"], job["code"])
        finally:
            os._exit(1)
    os.close(its_in)
    os.close(its_out)
    channel = _Channel(our_in, our_out, life, min(end, time.monotonic() + job["case_seconds"]))
    try:
        printed = channel.exchange(given, len(wanted) + _PRINTED_BYTES)
        return _lines(printed) == _lines(wanted) and channel.status(child) == 0
    except (_Over, OSError):
        return False
    finally:
        os.close(our_in)
        channel.close()
        _end(child, isolated)


def _lines(text: bytes) -> list[bytes]:
    """Return the lines of a text without the white space at their ends, nor empty ones at its end."""
    return [line.rstrip() for line in text.rstrip().split(b"\n")]


class _Over(Exception):
    """The time is over, too much was printed, or the run wants no more."""


class _Channel:
    """The connection with a process under test, which waits for nothing beyond the time limit."""

    def __init__(self, reads: int, writes: int, life: int, end: float) -> None:
        os.set_blocking(writes, False)
        self.reads, self.writes, self.life, self.end = reads, writes, life, end

    def send(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            self._wait([self.life], [self.writes])
            view = view[os.write(self.writes, view) :]

    def receive(self, count: int) -> bytes:
        """Return so many bytes, or fewer where the process has closed its end."""
        content = b""
        while len(content) < count:
            self._wait([self.life, self.reads], [])
            if not (part := os.read(self.reads, count - len(content))):
                break
            content += part
        return content

    def exchange(self, content: bytes, most: int) -> bytes:
        """Send the content and then its end, and return all that comes meanwhile, which may be so much."""
        view, found = memoryview(content), bytearray()
        while True:
            if not view:
                self.close()
            ready = self._wait([self.life, self.reads], [self.writes] if view else [])
            if ready[1]:
                try:
                    view = view[os.write(self.writes, view) :]
                except BrokenPipeError:  # it reads no more, as it may
                    view = view[:0]
            if ready[0]:
                if not (part := os.read(self.reads, 2**16)):
                    return bytes(found)
                found += part
            if len(found) > most:
                raise _Over

    def close(self) -> None:
        """Let the process read that there is no more."""
        if self.writes >= 0:
            os.close(self.writes)
            self.writes = -1

    def status(self, child: int) -> int:
        """Wait until the process has ended, and return its status."""
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if select.select([self.life], [], [], 0.001)[0] or time.monotonic() > self.end:
                raise _Over
        return ended[1]

    def _wait(self, reads: list[int], writes: list[int]) -> tuple[list[int], list[int]]:
        found = select.select(reads, writes, [], max(0.0, self.end - time.monotonic()))
        if self.life in found[0] or not (found[0] or found[1]):
            raise _Over
        return found[0], found[1]


def _judged(channel: _Channel, test: bytes) -> bool:
    try:
        if channel.receive(1) != _READY:
            return False
        channel.send(len(test).to_bytes(8, "big") + test)
        if channel.receive(1) != _DONE:
            return False
        nonce = os.urandom(_NONCE)
        channel.send(nonce)
        return channel.receive(_NONCE) == nonce
    except (_Over, OSError):
        return False


def _end(child: int, isolated: bool) -> None:
    """End a test's process and all that descends from it."""
    if isolated and os.getpid() == 1:  # -1 is then what runs in this namespace, less this process
        with suppress(OSError):
            os.kill(-1, _SIGKILL)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        return
    for send in (os.killpg, os.kill):
        with suppress(OSError):
            send(child, _SIGKILL)
    for _ in range(_ROUNDS):
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        for process in _descendants():
            with suppress(OSError):
                os.kill(process, _SIGKILL)
        time.sleep(0.005)


def _descendants() -> set[int]:
    """Return the processes that descend from this one; none where there is no ``/proc``."""
    parents: dict[int, int] = {}
    with suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found: set[int] = set()
    before, now = -1, {os.getpid()}
    while len(found) != before:
        before = len(found)
        found |= (now := {process for process, parent in parents.items() if parent in now})
    return found - {os.getpid()}


def _limit(job: dict[str, Any], kept: tuple[int, int], isolated: bool) -> None:
    """Take from this process what a program under test has no use for."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    low, high = sorted(kept)
    for first, last in ((3, low), (low + 1, high), (high + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])):
        os.closerange(first, last)
    if _libc is not None:
        _libc.prctl(_PDEATHSIG, _SIGKILL)
        _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
        _libc.capset(header, (ctypes.c_uint32 * 6)())
    seconds = int(job["seconds"]) + 2
    limits = {
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (seconds, seconds + 1),
        "RLIMIT_FSIZE": (_FILE_BYTES, _FILE_BYTES),
        "RLIMIT_NOFILE": (_OPEN_FILES, _OPEN_FILES),
        "RLIMIT_AS": (job["memory"], job["memory"]),
    }
    if isolated:  # elsewhere all processes of the user count
        limits["RLIMIT_NPROC"] = (_PROCESSES, _PROCESSES)
    for name, values in limits.items():
        with suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, name), values)


def _execute(setup: str, code: str, reads: int, writes: int) -> NoReturn:
    """Run the code and then a test, which is not there before; the builtins that the test sees are the real ones."""
    receive, send, leave, run, read = os.read, os.write, os._exit, exec, compile
    before, trace, profile = dict(vars(builtins)), sys.settrace, sys.setprofile
    module = type(sys)("completion")
    sys.modules["completion"] = module  # dataclasses, pickle and typing look it up
    names = vars(module)
    try:
        for text in (setup, code):
            run(read(text, "<completion>", "exec", dont_inherit=True), names)
        trace(None)
        profile(None)
        vars(builtins).update(before)
        names["__builtins__"] = builtins
        send(writes, _READY)
        length, test = int.from_bytes(receive(reads, 8), "big"), b""
        while len(test) < length and (part := receive(reads, length - len(test))):
            test += part
        run(read(test.decode("utf-8", "surrogatepass"), "<test>", "exec", dont_inherit=True), names)
        send(writes, _DONE)
        send(writes, receive(reads, _NONCE))
    finally:
        leave(0)


def _execute_program(setup: str, code: str) -> None:
    """Run the code as ``python FILE`` would: threads are waited for at its end, and an error is its status."""
    module = sys.modules["__main__"] = type(sys)("__main__")
    del sys.argv[1:]
    status: Any = 0
    try:
        for text in (setup, code):
            exec(compile(text, "<completion>", "exec", dont_inherit=True), vars(module))
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        status = 1
    ctypes.pythonapi.Py_Exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    main()
