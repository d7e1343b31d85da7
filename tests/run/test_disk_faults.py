"""A disk that is full, read-only or failing: one sentence with path, cause and what to do, and nothing half written."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_run import go_on, recipe, save, start

from lowmem_rlhf import files
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.evaluations import append_evaluation

CAUSES = {
    errno.ENOSPC: "the disk is full; make room there",
    errno.EDQUOT: "your quota of the disk is used up; make room there",
    errno.EROFS: "the disk is read-only; choose a folder on another disk",
    errno.EACCES: "there is no permission to; give yourself the right",
    errno.EIO: "the disk failed; check the disk",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter path",
    errno.EFBIG: "the file would be larger than allowed; raise the limit",
    errno.ENXIO: ".*No such device.*; look at the disk",
}


def checkpoint(run: RunDirectory) -> None:
    with run.new_checkpoint(2) as (folder, state):
        (folder / "critic").mkdir()
        (folder / "critic" / "x.json").write_text("new")
        state["counters"] = {}


def adapter(run: RunDirectory) -> None:
    with run.new_adapter() as folder:
        (folder / "x.json").write_text("new")


# what is written, the path that the sentence names, and the functions of the system that it goes through
WRITERS: dict[str, tuple[Callable[[RunDirectory], object], str, set[str]]] = {
    "metrics": (lambda run: run.log_metrics({"step": 2}), "metrics.jsonl", {"open"}),
    "samples": (lambda run: run.log_samples(2, [{"prompt": "p"}]), "samples.jsonl", {"open"}),
    "results": (lambda run: run.write_evaluation({"after": {}}), "evaluation.json", {"open", "fsync", "replace"}),
    "a checkpoint": (checkpoint, "step-2", {"open", "fsync", "replace", "mkdir"}),
    "the adapter": (adapter, "adapter", {"open", "fsync", "replace", "mkdir"}),
    "an evaluation": (lambda run: append_evaluation(run.path, {"made": "now"}), "evaluations.jsonl", {"open"}),
}
CASES = [(writer, place, errno.ENOSPC) for writer, (_, _, places) in WRITERS.items() for place in sorted(places)]


def refuse(patch: pytest.MonkeyPatch, place: str, number: int) -> None:
    """Let one function of the system refuse to write."""
    real = io.open

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    def open_to_read(path: object, mode: str = "r", *rest: object, **named: object) -> object:
        return fail() if set(mode) & set("wax+") else real(path, mode, *rest, **named)

    places = {"open": (io, "open", open_to_read), "fsync": (os, "fsync", fail), "replace": (os, "replace", fail)}
    patch.setattr(*places.get(place, (os, "mkdir", fail)))


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("hashes.json")  # is written before its file, and knows both
    return found


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = start(tmp_path / "run")
    for name in ("metrics", "samples", "results", "an evaluation"):
        WRITERS[name][0](run)
    save(run, 1)
    return run


@pytest.mark.parametrize(
    ("writer", "place", "number"), [*CASES, *(("a checkpoint", "open", number) for number in CAUSES)]
)
def test_a_refused_write_is_one_sentence_and_leaves_what_was_there(run, monkeypatch, writer, place, number):
    write, path, _ = WRITERS[writer]
    before = contents(run.path)
    with monkeypatch.context() as patch:
        refuse(patch, place, number)
        with pytest.raises(RunError, match=rf"{path} cannot be written: {CAUSES[number]}") as caught:
            write(run)
    assert "\n" not in str(caught.value)
    assert contents(run.path) == before
    assert go_on(run.path, recipe()).latest_checkpoint()[0] == 1


@pytest.mark.parametrize(
    ("place", "number"),
    [*((place, errno.ENOSPC) for place in ("open", "fsync", "replace")), *(("mkdir", number) for number in CAUSES)],
)
def test_a_run_that_cannot_begin_is_the_users_error(tmp_path, monkeypatch, place, number):
    with monkeypatch.context() as patch:
        refuse(patch, place, number)
        with pytest.raises(UserError, match=rf"run cannot be written: {CAUSES[number]}.*--output"):
            start(tmp_path / "run")
    start(tmp_path / "run")


@pytest.mark.parametrize("place", ["open", "fsync", "replace"])
def test_a_run_that_cannot_go_on_is_the_users_error(run, monkeypatch, place):
    before = contents(run.path)
    with monkeypatch.context() as patch:
        refuse(patch, place, errno.ENOSPC)
        with pytest.raises(UserError, match="the disk is full"):
            go_on(run.path, recipe())
    after = contents(run.path)
    assert {**after, ".lock": b""} == {**before, ".lock": b""}


def test_errors_of_libraries_in_rust_count_and_others_do_not():
    from safetensors import SafetensorError

    rust = 'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
    for error in (SafetensorError(rust), Exception("No space left on device (os error 28)")):
        refused = pytest.raises(
            RunError, match="there cannot be written: the disk is full; make room there, then go on"
        )
        with refused, files.writing("there", remedy="then go on"):
            raise error
    for other in (ValueError("code of conduct"), SafetensorError("invalid header"), KeyboardInterrupt()):
        with pytest.raises(type(other)), files.writing("there"):
            raise other


def test_a_checkpoint_that_has_no_room_is_not_begun(run):
    refused = pytest.raises(RunError, match=r"step-2 needs 1,.* MB and .* MB are free on that disk; make room there")
    with refused, run.new_checkpoint(2, needed=1 << 60):
        raise AssertionError
    assert not list((run.path / "checkpoints").glob(".*"))


def test_half_a_row_is_taken_back(run, monkeypatch):
    """A disk that fills up within a row; the real file is closed before it is taken back."""
    real = io.open

    class Full:
        def __init__(self, file: io.BufferedRandom) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            io, "open", lambda path, mode="r", *rest: Full(real(path, mode)) if "a" in mode else real(path, mode)
        )
        with pytest.raises(RunError, match=r"metrics.jsonl cannot be written: the disk is full"):
            run.log_metrics({"step": 2, "loss": 1.0})
    assert (run.path / "metrics.jsonl").read_bytes() == b'{"step": 2}\n'
