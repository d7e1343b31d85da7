"""A run that is stopped: `python stops_process.py MODEL OUTPUT CASE [kills=N] [operations=N] [signals=N] [others=1]`.

Runs a case undisturbed, then once for each stop, and resumes it: SIGKILL at random moments ("kills") and at the n-th
file operation ("operations"), SIGINT, SIGTERM and SIGHUP in turn at random moments ("signals"), and in other ways
("others"). Writes OUTPUT/CASE.json: one row a stop with what happened and the SHA-256 of what the resumed run trained.
Every run is a fork of this process, where everything is imported already.
"""

import builtins
import contextlib
import hashlib
import json
import os
import pty
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors.torch import load_file
from spared import spare_collector
from tiny_runs import tiny_recipe

from lowmem_rlhf import cli, stopping
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards import time_limit
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training import loop

spare_collector()
torch.set_num_threads(1)  # a fork has only the thread that forked
MODEL, OUTPUT, CASE = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
COUNTS = {"kills": 0, "operations": 0, "signals": 0, "others": 0, "steps": 6, "seed": 1} | {
    key: int(value) for key, _, value in (one.partition("=") for one in sys.argv[4:])
}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
STEPS = COUNTS["steps"]


def grpo() -> Recipe:
    return of_case(grpo={"beta": 0.04, "num_iterations": 3})


def ppo() -> Recipe:
    return of_case(algorithm="ppo", ppo={"num_ppo_epochs": 4, "num_mini_batches": 2, "kl_target": 0.1})


def sft() -> Recipe:
    return of_case(algorithm="sft", sft={"max_length": 32}, rewards=[])


def of_case(**sections: Any) -> Recipe:
    training = {"max_steps": STEPS, "save_steps": STEPS - 2, "save_total_limit": 1}
    return tiny_recipe(MODEL, data={"eval_size": 2}, training=training, **sections)


CASES = {"grpo": grpo, "ppo": ppo, "sft": sft}


def forked(recipe: Path, folder: Path, *more: str, prepare: Callable[[], None] | None = None) -> int:
    """Begin a run in a process of its own; return its id. What it prints goes to FOLDER.log."""
    if child := os.fork():
        return child
    try:
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if prepare:
            prepare()
        sys.argv = ["lowmem-rlhf", "train", str(recipe), "--output", str(folder), *more]
        cli.main()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(bool(exit.code))
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(child: int) -> int:
    """Wait for a process; return its exit code, negative the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted_operations(at: int, file: Path | None = None) -> Callable[[], None]:
    """Return what lets a process kill itself before its n-th file operation; or write down how many there were."""

    def prepare() -> None:
        count = 0

        def counted(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def wrapped(*args: Any, **given: Any) -> Any:
                nonlocal count
                mode = str(given.get("mode", args[1] if len(args) > 1 else "r")) if name == "open" else "w"
                if set(mode) & set("wax+"):
                    count += 1
                    if count == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if file is not None:
                        Path.write_text(file, str(count)) if name != "open" else None
                return original(*args, **given)

            setattr(owner, name, wrapped)

        for name in ("replace", "fsync", "mkdir", "unlink", "rename", "rmdir"):
            counted(os, name)
        counted(shutil, "rmtree")
        counted(builtins, "open")

    return prepare


def wait_for_steps(child: int, folder: Path) -> None:
    """Wait until a run has its folder, a moment before it begins."""
    wait_for(child, (folder / "plan.json").is_file)


def wait_for(child: int, moment: Callable[[], bool]) -> None:
    """Wait for a moment, or the end of a process."""
    while not moment() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)


def digest(folder: Path) -> str:
    """Return the SHA-256 of everything that a run trained."""
    found = hashlib.sha256()
    for file in sorted((folder / "adapter").rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            found.update(f"{file.name} {name}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def one_stop(recipe: Path, kind: str, when: float | int, number: int = 0) -> dict[str, Any]:
    """Stop a run, look at what is on the disk, resume it; return what happened."""
    folder = OUTPUT / f"{CASE}-stopped"
    for path in (folder, Path(f"{folder}.log")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    child = forked(recipe, folder, prepare=counted_operations(int(when)) if kind == "operation" else None)
    if kind != "operation":
        wait_for_steps(child, folder)
        time.sleep(when)
        os.kill(child, number or signal.SIGKILL)
    code = ended(child)
    log = Path(f"{folder}.log").read_text(errors="replace")
    row: dict[str, Any] = {"kind": kind, "when": when, "signal": number, "code": code}
    if kind == "signal":
        row |= signalled(folder, log, code, number)
    if (folder / "recipe.yaml").is_file():
        resumed = ended(forked(recipe, folder, "--resume"))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        resumed = ended(forked(recipe, folder))
    row |= {"resumed": resumed, "sha256": digest(folder) if resumed == 0 else ""}
    row["steps"] = [one["step"] for one in RunDirectory(folder).metrics()]
    row["checkpoints"] = len(RunDirectory(folder).checkpoints())
    if code == 99 or resumed:
        row["log"] = Path(f"{folder}.log").read_text(errors="replace")[-3000:]
    return row


def signalled(folder: Path, log: str, code: int, number: int) -> dict[str, Any]:
    """Hold what a stopped run says against what is on the disk."""
    run = RunDirectory(folder)
    finished = run.metrics()[-1]["step"] if run.metrics() else 0
    latest = run.latest_checkpoint()
    kept = latest[0] if latest else 0
    said = re.search(r"(?:step (\d+)|no step) is kept", log)
    return {
        "finished": finished,
        "kept": kept,
        "said": int(said[1] or 0) if said else None,
        "right_code": code in (0, SIGNALS[signal.Signals(number)]),
        "lost": "lost" in log,
    }


def second_signal(recipe: Path, folder: Path) -> int:
    """Stop a run whose last saving takes long, twice."""
    begun = OUTPUT / "saving"

    def slow_save() -> None:
        def save(*args: object) -> None:
            if stopping._received is not None:  # not that of every step: nothing is kept then
                begun.touch()
                time.sleep(60)

        loop.save_checkpoint = save

    child = forked(recipe, folder, prepare=slow_save)
    wait_for(child, lambda: len(RunDirectory(folder).metrics()) >= 2)  # the second may be taken back: not the first
    os.kill(child, signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGHUP):  # at once: these belong to the first
        os.kill(child, number)
    wait_for(child, begun.exists)  # a busy machine may be seconds late: a signal sent before would be of the first
    time.sleep(1.2)
    os.kill(child, signal.SIGHUP)  # of a terminal: never
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    return ended(child)


def ignored_signals(recipe: Path, folder: Path) -> int:
    """Send signals to a run that was begun with them ignored, as `nohup` and a shell's background do."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    child = forked(recipe, folder, prepare=ignore)
    wait_for_steps(child, folder)
    os.kill(child, signal.SIGHUP)
    os.kill(child, signal.SIGINT)
    return ended(child)


def closed_terminal(recipe: Path, folder: Path) -> int:
    """Close the terminal that a run writes to."""
    child, terminal = pty.fork()
    if not child:
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["lowmem-rlhf", "train", str(recipe), "--output", str(folder)]
        try:
            cli.main()
            os._exit(0)
        except SystemExit as exit:
            os._exit(int(exit.code or 0))
        except BaseException:
            os._exit(99)
    os.set_blocking(terminal, False)

    def drained() -> bool:
        with contextlib.suppress(OSError):
            os.read(terminal, 1 << 16)
        return len(RunDirectory(folder).metrics()) >= 1

    wait_for(child, drained)
    os.close(terminal)
    return ended(child)


STUCK = """
import ctypes

calls = []

def stuck(completions, **columns):
    calls.append(1)
    if len(calls) == 3:  # after the evaluation and the first step
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)  # for ever
    return [float(len(one)) for one in completions]
"""


def stuck_reward(recipe: Path, folder: Path) -> int:
    """Let a reward wait in code that Python cannot interrupt."""
    (OUTPUT / "stuck.py").write_text(STUCK)
    rewards = f'rewards=[{{function: "{OUTPUT / "stuck.py"}:stuck", timeout: 0.3}}]'

    def hurry() -> None:
        time_limit.GRACE = 1.5

    return ended(forked(recipe, folder, rewards, "evaluation.accuracy=stuck", prepare=hurry))


OTHERS = {
    "stuck reward": stuck_reward,
    "second signal": second_signal,
    "ignored signals": ignored_signals,
    "closed terminal": closed_terminal,
}


def other_stop(recipe: Path, kind: str) -> dict[str, Any]:
    """Stop a run in one of `OTHERS`' ways; return what is on the disk and what was said."""
    folder = OUTPUT / f"{CASE}-{kind.replace(' ', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    began = time.monotonic()
    code = OTHERS[kind](recipe, folder)
    run = RunDirectory(folder)
    latest = run.latest_checkpoint()
    return {
        "kind": kind,
        "code": code,
        "seconds": time.monotonic() - began,
        "finished": len(run.metrics()),
        "kept": latest[0] if latest else 0,
        "log": log.read_text(errors="replace")[-500:] if log.exists() else "",
    }


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for number in SIGNALS:  # also where this process was begun with them ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    file, whole = OUTPUT / f"{CASE}.yaml", OUTPUT / CASE
    shutil.rmtree(whole, ignore_errors=True)
    file.write_text(CASES[CASE]().to_yaml())
    counter = OUTPUT / f"{CASE}.operations"
    assert ended(forked(file, whole, prepare=counted_operations(-1, counter))) == 0, Path(f"{whole}.log").read_text()
    shutil.rmtree(whole)
    child = forked(file, whole)
    wait_for_steps(child, whole)
    began = time.monotonic()
    assert ended(child) == 0
    lasted, operations, wanted = time.monotonic() - began, int(counter.read_text()), digest(whole)
    draws = random.Random(COUNTS["seed"])
    rows = [one_stop(file, "kill", draws.uniform(0, lasted)) for _ in range(COUNTS["kills"])]
    if COUNTS["operations"]:
        every = max(1, operations // COUNTS["operations"])
        rows += [one_stop(file, "operation", at) for at in range(1 + draws.randrange(every), operations, every)]
    for turn in range(COUNTS["signals"]):
        rows.append(one_stop(file, "signal", draws.uniform(0, lasted), list(SIGNALS)[turn % len(SIGNALS)]))
    rows += [other_stop(file, kind) for kind in (OTHERS if COUNTS["others"] else ())]
    facts = {"seconds": lasted, "operations": operations, "sha256": wanted, "steps": STEPS, "stops": rows}
    (OUTPUT / f"{CASE}.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
