"""One process writes a run; a lock of a dead one is no obstacle."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_run import PLAN, names, recipe

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.progress import shown_by
from lowmem_rlhf.run import lock
from lowmem_rlhf.run.directory import RunDirectory, default_output
from lowmem_rlhf.run.evaluations import append_evaluation, read_evaluations
from lowmem_rlhf.run.lock import Lock

HOLD = """
import sys
from pathlib import Path
from lowmem_rlhf.run.lock import Lock
lock = Lock(Path(sys.argv[1]), "it")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def new(path: Path, resume: bool = False) -> RunDirectory:
    return RunDirectory.create(path, recipe(), PLAN, resume)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def holder(tmp_path):
    """Return a process of its own that holds the lock of tmp_path/run."""
    new(tmp_path / "run").unlock()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named_and_nothing_is_changed_until_it_is_dead(tmp_path, holder):
    before = contents(tmp_path)
    for attempt in (lambda: new(tmp_path / "run", True), lambda: RunDirectory.check(tmp_path / "run", recipe(), True)):
        with pytest.raises(UserError, match=rf"is being written by another process \(pid {holder.pid} on .*since 20"):
            attempt()
    assert contents(tmp_path) == before
    holder.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    holder.wait()
    new(tmp_path / "run", True)


def test_a_second_writer_of_this_process_is_refused_until_the_first_ends(tmp_path):
    run = new(tmp_path / "run")
    for resume in (True, False):
        with pytest.raises(UserError, match=rf"this process \(pid {os.getpid()} on"):
            new(tmp_path / "run", resume)
    run.unlock()
    second = new(tmp_path / "run", True)
    with pytest.raises(UserError, match="this process"):
        run.lock()
    second.unlock()
    with pytest.raises(UserError, match="went on elsewhere"):
        run.lock()
    second.lock()
    del second  # whoever drops a run holds it no longer
    new(tmp_path / "run", True)


def test_of_many_that_begin_a_run_at_once_one_gets_it(tmp_path):
    def begin(_: int) -> object:
        try:
            return new(tmp_path / "run")
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(begin, range(8)))
    assert sum(isinstance(one, RunDirectory) for one in results) == 1
    assert all("being written" in one or "holds a run" in one for one in results if isinstance(one, str))


def test_a_lock_file_is_no_run_and_no_foreign_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    (tmp_path / "run" / ".lock").write_text("left by a process that died before anything was there")
    with pytest.raises(UserError, match="no run in"):
        new(tmp_path / "run", resume=True)
    assert new(Path("run")).path == Path("run")
    assert default_output("other") == Path("runs/other")


def test_a_folder_that_is_no_run_gets_no_lock_file(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for resume in (True, False):
        with pytest.raises(UserError):
            new(tmp_path, resume)
    assert names(tmp_path) == {"thesis.tex"}


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch):
    class Said(list):
        message = list.append

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_system_lock", none)
    monkeypatch.setattr(lock, "_said", set())
    with shown_by(said := Said()):
        new(tmp_path / "a"), new(tmp_path / "b")
    assert len(said) == 1 and "has no locks (No locks available)" in said[0]


def test_a_removed_lock_leaves_no_file_and_its_successor_is_a_real_one(tmp_path):
    first, second, third = (Lock(tmp_path / ".x.lock", "the export") for _ in range(3))
    first.acquire()
    with pytest.raises(UserError, match="the export is being written by this process"):
        second.acquire()
    first.remove()
    assert names(tmp_path) == set()
    second.acquire()
    with pytest.raises(UserError):
        third.acquire()


def test_evaluations_of_several_at_once_are_all_kept_and_a_torn_line_is_dropped(tmp_path):
    (tmp_path / "evaluations.jsonl").write_bytes(b'{"made": "first"}\n{"made": "to')
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_evaluation(tmp_path, {"i": i, "text": "x" * 20_000}), range(16)))
    rows = read_evaluations(tmp_path)
    assert rows[0] == {"made": "first"} and sorted(row["i"] for row in rows[1:]) == list(range(16))


def test_a_run_keeps_its_folder_where_the_current_one_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = new(Path("runs/a"))
    assert str(run.path) == str(Path("runs/a"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.log_metrics({"step": 1})
    with run.new_checkpoint(1):
        pass
    run.write_evaluation({"before": {}})
    assert names(tmp_path / "elsewhere") == set() and run.path == tmp_path / "runs" / "a"
    assert names(tmp_path / "runs" / "a") >= {"metrics.jsonl", "checkpoints", "evaluation.json"}
    monkeypatch.chdir(tmp_path)
    assert run.path == Path("runs/a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_child_that_ends_does_not_give_the_lock_away(tmp_path):
    held = Lock(tmp_path / "lock", "it")
    held.acquire()
    if not (child := os.fork()):
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(UserError, match="another Trainer"):
        Lock(tmp_path / "lock", "it").acquire()
    held.release()


def test_who_looks_need_not_write_and_keeps_nobody_else_away(tmp_path, holder, monkeypatch):
    opened = os.open

    def refused(path, flags, *rest, **options):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *rest, **options)

    file = tmp_path / "run" / ".lock"
    with monkeypatch.context() as patch:  # of another user
        patch.setattr(os, "open", refused)
        with pytest.raises(UserError, match="is being written by another process"):
            Lock(file, "it").check()
    fcntl = pytest.importorskip("fcntl")
    (other := tmp_path / "other").write_text("")
    with other.open("rb") as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        Lock(other, "it").check()
        monkeypatch.setattr(lock.time, "sleep", lambda _: fcntl.flock(looks, fcntl.LOCK_UN))
        (mine := Lock(other, "it")).acquire()
        mine.release()
