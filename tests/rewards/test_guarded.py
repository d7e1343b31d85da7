"""Whatever a user's function does, the process is as it was before the call, and the fault is the function's."""

import asyncio
import contextlib
import gc
import io
import locale
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.progress import shown_by
from lowmem_rlhf.rewards import Reward, score
from lowmem_rlhf.rewards import time_limit as limits

IDS = [[1, 2, 3], [1, 2]]


class Told:
    """A display that keeps what it is told."""

    def __init__(self):
        self.messages = []

    def phase(self, *_):
        pass

    def message(self, text):
        self.messages.append(text)


def reward(function, **settings):
    return Reward(settings.pop("name", "r"), function, **settings)


def scored(*rewards, **columns):
    return score(rewards, ["p", "p"], ["a", "b"], IDS, columns)


def acting(action):
    """Return a reward function that does something first."""

    def function(**_):
        action()
        return [1.0, 0.0]

    return function


def state():
    """Return what a function could change."""
    return {
        "folder": os.getcwd(),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "path": list(sys.path),
        "home": os.environ.get("HOME"),
        "recursion": sys.getrecursionlimit(),
        "gc": gc.isenabled(),
        "locale": locale.setlocale(locale.LC_ALL),
        "filters": list(warnings.filters),
        "logging": (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)),
        "own logger": (logging.getLogger("lowmem_rlhf").level, logging.getLogger("lowmem_rlhf").disabled),
        "numpy errors": numpy.geterr(),
        "random": (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGURG)],
        "alarm": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "type and device": (torch.get_default_dtype(), torch.get_default_device(), torch.ones(1).device),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    }


def entered(context):
    held.append(context)
    context.__enter__()


held: list = []

VANDALS = {
    "chdir": lambda: os.chdir("/"),
    "stdout": lambda: setattr(sys, "stdout", io.StringIO()),
    "stderr": lambda: setattr(sys, "stderr", None),
    "close stdout": lambda: sys.stdout.close(),
    "close in with": lambda: sys.stderr.__enter__().__exit__(None, None, None),
    "path": lambda: sys.path.insert(0, "/"),
    "environment": lambda: os.environ.pop("HOME"),
    "recursion": lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 50),
    "gc": gc.disable,
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C" if locale.setlocale(locale.LC_ALL) != "C" else "C.UTF-8"),
    "filters": lambda: warnings.simplefilter("error"),
    "logging off": lambda: logging.disable(logging.CRITICAL),
    "logging": lambda: logging.basicConfig(level=logging.DEBUG, force=True),
    "own logger": lambda: setattr(logging.getLogger("lowmem_rlhf"), "disabled", True),
    "numpy errors": lambda: numpy.seterr(all="raise"),
    "random": lambda: random.seed(0),
    "numpy random": lambda: numpy.random.seed(0),
    "torch random": lambda: torch.manual_seed(0),
    "ctrl-c": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "terminate": lambda: signal.signal(signal.SIGTERM, lambda *_: None),
    "alarm": lambda: (signal.signal(signal.SIGALRM, lambda *_: None), signal.alarm(100)),
    "own signal": lambda: signal.signal(signal.SIGURG, signal.SIG_IGN),
    "gradients off": lambda: torch.set_grad_enabled(False),
    "inference mode": lambda: entered(torch.inference_mode()),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "type": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
}


@pytest.mark.parametrize("name", VANDALS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_as_before(name, fails):
    def vandal(**_):
        VANDALS[name]()
        if fails:
            raise ValueError
        return [1.0, 0.0]

    before = state()
    scored(reward(vandal, on_error="zero"))
    assert state() == before
    print("still open", flush=True)


def test_an_alarm_that_was_set_before_rings_when_it_would_have(monkeypatch):
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        scored(reward(acting(lambda: signal.alarm(0))))
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung


def test_new_environment_variables_stay(monkeypatch):
    monkeypatch.delenv("OF_A_LIBRARY", raising=False)
    scored(reward(acting(lambda: os.environ.update(OF_A_LIBRARY="1"))))
    assert os.environ.pop("OF_A_LIBRARY") == "1"


def test_each_function_draws_random_numbers_of_its_own():
    drawn: dict[str, list] = {"one": [], "other": []}

    def one(**_):
        drawn["one"].append((random.random(), numpy.random.rand(), float(torch.rand(()))))
        return [0.0, 0.0]

    def other(**_):
        drawn["other"].append(random.random())
        random.seed(0)
        return [0.0, 0.0]

    def step(number: int) -> None:
        state = SimpleNamespace(global_step=number)
        score([reward(one, name="one"), reward(other, name="other")], ["p", "p"], ["a", "b"], IDS, {}, state)

    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    before = random.getstate()
    step(0), step(1)
    assert len({number for numbers in drawn["one"] for number in numbers}) == 6 and len(set(drawn["other"])) == 2
    assert random.getstate() == before
    step(1), step(0)  # a step that is taken again, a run that is resumed
    assert drawn["one"][2:] == drawn["one"][1::-1] and drawn["other"][2:] == drawn["other"][1::-1]
    random.seed(2)
    step(0)
    assert drawn["one"][4] != drawn["one"][0]  # another run


def test_what_is_printed_goes_where_prints_go(capsys):
    scored(reward(acting(lambda: (print("a"), print("b", file=sys.stderr), sys.stdout.close()))))
    print("c")
    assert capsys.readouterr() == ("a\nc\n", "b\n")


def test_nothing_that_is_given_is_shared():
    """Of all arguments: tensors, arrays and what is nested in columns, and the state of the trainer."""
    from types import SimpleNamespace

    def vandal(completion_ids, tensors, arrays, entry, trainer_state, **_):
        completion_ids[0].clear()
        tensors[0].zero_(), arrays[0].fill(0)
        entry[0]["deep"][0]["er"].append(1)
        trainer_state.global_step = 100
        return [0.0, 0.0]

    state = SimpleNamespace(global_step=3)
    columns = {
        "tensors": [torch.ones(2), torch.ones(2)],
        "arrays": [numpy.ones(2), numpy.ones(2)],
        "entry": [{"deep": ({"er": []},)}, {}],
    }
    ids = [[1, 2, 3], [1, 2]]
    score([reward(vandal)], ["p", "p"], ["a", "b"], ids, columns, state)
    assert ids == IDS and state.global_step == 3 and columns["entry"][0] == {"deep": ({"er": []},)}
    assert columns["tensors"][0].tolist() == columns["arrays"][0].tolist() == [1.0, 1.0]


# What a function raises


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError


def deep(n=0):
    return deep(n + 1)


def raising(error):
    def function(**_):
        raise error

    return function


RAISED = {
    "SystemExit": raising(SystemExit(0)),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "GeneratorExit": raising(GeneratorExit()),
    "MemoryError": raising(MemoryError()),
    "BaseException": raising(BaseException("x")),
    "RecursionError": lambda **_: deep(),
    "Unspeakable": raising(Unspeakable()),
    "CancelledError": raising(asyncio.CancelledError()),
}


@pytest.mark.parametrize("name", RAISED)
def test_whatever_a_function_raises_is_its_fault(name):
    with pytest.raises(RunError, match=f"reward function r failed: {name}") as caught:
        scored(reward(RAISED[name]))
    assert "\n" not in str(caught.value)
    assert scored(reward(RAISED[name], on_error="skip"), reward(acting(int), name="ok")).total == [1.0, 0.0]


def test_file_and_line_are_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def function(**_):\n    x = 1\n    raise KeyboardInterrupt\n")
    from lowmem_rlhf.user_code import load_function

    function = load_function(f"{file}:function", "rewards", "a reward function", "()")
    with pytest.raises(RunError, match=r"mine\.py, line 3: KeyboardInterrupt"):
        scored(reward(function, source=str(file)))


def ctrl_c(**_):
    signal.raise_signal(signal.SIGINT)
    return [1.0, 0.0]


def swallowed(**_):
    try:
        ctrl_c()
    except BaseException:
        return [1.0, 0.0]


def turned(**_):
    try:
        ctrl_c()
    except BaseException as error:
        raise ValueError("other") from error


@pytest.mark.parametrize("policy", ["fail", "skip", "zero"])
@pytest.mark.parametrize("function", [ctrl_c, swallowed, turned])
def test_ctrl_c_stops_the_run(function, policy):
    one = reward(function, on_error=policy)
    with pytest.raises(KeyboardInterrupt):
        scored(one)
    assert not one.record.failed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_handlers_of_other_signals_raise_is_raised():
    class Stop(Exception):
        pass

    def handler(*_):
        raise Stop

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Stop):
            scored(reward(acting(lambda: signal.raise_signal(signal.SIGTERM)), on_error="skip"))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out_is_no_fault_of_the_function(error):
    with pytest.raises(type(error)) as caught:
        scored(reward(raising(error), on_error="skip"))
    assert caught.value is error


def test_what_is_not_installed_is_said_as_it_is():
    with pytest.raises(UserError, match="reasoning-gym"):
        scored(reward(raising(UserError("reasoning-gym is not installed")), on_error="skip"))


def test_a_folder_that_is_gone_ends_the_run(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RunError, match=r"the folder .*here that the run works in cannot be entered"):
        scored(reward(acting(lambda: (os.chdir(".."), os.rmdir("here"))), on_error="skip"))


# What a function gives


class Number:
    def __float__(self):
        raise RuntimeError


@pytest.mark.parametrize("value", [1e39, -1e39, 10**400, 1j, "1", b"1", [1.0], {}, Number(), object(), torch.ones(2)])
def test_what_is_no_number_of_float32_is_refused(value):
    with pytest.raises(RunError, match=r"r returned .* for completion 2; it must return a finite number"):
        scored(reward(lambda **_: [1.0, value]))
    assert scored(reward(lambda **_: [1.0, value], on_error="skip")).by_name == {"r": [1.0, None]}
    assert scored(reward(lambda **_: [1.0, value], on_error="zero")).by_name == {"r": [1.0, 0.0]}


def test_sums_that_overflow_are_refused():
    rewards = [reward(lambda **_: [1.0, 1.0], name="small"), reward(lambda **_: [1.0, 1e30], name="large", weight=2.0)]
    with pytest.raises(RunError, match=r"completion 2 add up to 2e\+30, most of it from large \(weight 2\); .*float32"):
        scored(*rewards)


def endless(**_):
    while True:
        yield 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (endless, "returned more than 2 values for 2 completions"),
        (lambda **_: [1.0], "returned 1 values"),
        (lambda **_: 1.0, "returned a float"),
        (lambda **_: (one for one in "ab"), "returned 'a' for completion 1"),
    ],
)
def test_the_policy_covers_what_is_returned(function, message):
    with pytest.raises(RunError, match=message):
        scored(reward(function))
    told = Told()
    with shown_by(told):
        scores = scored(reward(function, on_error="skip"))
    assert scores.by_name == {"r": [None, None]} and scores.failures == {"r": (2, 0)}
    assert message in told.messages[0]


def test_a_fault_is_said_once_and_counted():
    told, calls = Told(), iter(range(10))

    def every_other(**_):
        if next(calls) % 2:
            raise ValueError("no")
        return [1.0, float("nan")]

    one = reward(every_other, on_error="skip")
    with shown_by(told):
        failures = [scored(one, reward(acting(int), name="ok")).failures for _ in range(4)]
    assert failures == [{"r": (1, 0)}, {"r": (2, 0)}] * 2  # a function that may not fail has no counts
    (message,) = told.messages
    assert message.startswith("reward function r returned nan for completion 2") and "left out of the sum" in message
    assert (one.record.calls, one.record.failed) == (4, 2)


def test_a_thread_that_is_left_running_is_said_once():
    told, end = Told(), threading.Event()

    def function(**_):
        threading.Thread(target=end.wait, name="mine").start()
        threading.Thread(target=end.wait, daemon=True).start()
        return [1.0, 0.0]

    one = reward(function)
    with shown_by(told):
        scored(one), scored(one)
    end.set()
    (message,) = told.messages
    assert "has left a thread running (mine)" in message


def test_what_is_logged_can_be_written(tmp_path):
    from lowmem_rlhf.files import dumps

    loop: list = []
    loop.append(loop)

    def function(log_extra, log_metric, **_):
        log_extra("odd", [object(), loop])
        log_extra("plain", [1, "b"])
        log_metric("own", 2)
        return [1.0, 0.0]

    scores = scored(reward(function))
    assert "object object" in dumps(scores.extra) and scores.extra["plain"] == [1, "b"] and scores.metrics == {"own": 2}


# Time


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(limits, "_TICK", 0.05)


def sleeps(**_):
    time.sleep(30)


def spins(**_):
    while True:
        pass


def stubborn(**_):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            time.sleep(1)


async def waits(**_):
    await asyncio.sleep(30)


def yields(**_):
    yield 1.0
    time.sleep(30)


def with_alarms(**_):
    """As math-verify does: alarms of its own, which end before the limit."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    time.sleep(30)


@pytest.mark.parametrize("function", [sleeps, spins, stubborn, waits, yields, with_alarms])
@pytest.mark.parametrize("main", [True, False])
def test_a_function_that_does_not_return(function, main, quick):
    if not main and function not in (spins, waits):
        pytest.skip("what waits in the system is interrupted in the main thread alone")
    one, began = reward(function, timeout=0.1), time.monotonic()
    caught: list = []

    def work():
        try:
            scored(one)
        except RunError as error:
            caught.append(error)

    if main:
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start(), thread.join()
    assert time.monotonic() - began < 20
    assert str(caught[0]).startswith("reward function r did not return within its time limit of 0.1 seconds")
    told = Told()
    with shown_by(told):
        assert scored(reward(function, timeout=0.1, on_error="zero")).failures == {"r": (0, 2)}
    assert "count as 0" in told.messages[0]


def test_an_asynchronous_function_where_a_loop_runs(quick):
    async def notebook():
        # not 0.1: on a busy machine that ends within the making of the function's own loop, of which Python complains
        return scored(reward(waits, timeout=1.0, on_error="skip"), reward(quickly, name="q"))

    async def quickly(**_):
        await asyncio.sleep(0)
        return [1.0, 0.0]

    scores = asyncio.run(notebook())
    assert scores.failures == {"r": (0, 2)} and scores.total == [1.0, 0.0]


def test_a_call_that_has_caught_its_interruption_is_late_all_the_same(quick):
    def caught(**_):
        try:
            time.sleep(30)
        except BaseException:
            return [1.0, 0.0]

    assert scored(reward(caught, timeout=0.1, on_error="skip")).failures == {"r": (0, 2)}


def test_a_limit_leaves_nothing_behind(quick):
    handler = signal.getsignal(signal.SIGURG)
    scored(reward(sleeps, timeout=0.1, on_error="skip"))
    assert scored(reward(acting(lambda: time.sleep(0.3)), timeout=20)).total == [1.0, 0.0]
    assert signal.getsignal(signal.SIGURG) is handler


# Code that Python cannot interrupt, in a process of its own: a lock of C that is taken twice
STUCK = """
import ctypes
from lowmem_rlhf.rewards import Reward, score
from lowmem_rlhf.rewards import time_limit as limits

limits.GRACE, limits._TICK = 0.3, 0.1

def stuck(**_):
    lock = ctypes.create_string_buffer(64)
    library = ctypes.{library}(None)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)

def saved(message):
    print("saved", flush=True)
    limits.end_process(message)

with limits.stuck_calls_end_with({hook}, own_process={own}):
    score([Reward("r", stuck, timeout=0.3, on_error="skip")], ["p"], ["c"], [[1]], {{}})
"""


def run_stuck(**names):
    code = STUCK.format(**names)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)


@pytest.mark.skipif(sys.platform != "linux", reason="the lock is that of Linux")
def test_code_that_cannot_be_interrupted_ends_the_process_by_the_hook():
    done = run_stuck(library="CDLL", hook="saved", own=False)
    assert (done.returncode, done.stdout) == (1, "saved\n")
    assert done.stderr.startswith("error: reward function r did not return within its time limit of 0.3 seconds and c")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the lock is that of Linux")
def test_code_that_holds_pythons_lock_ends_the_process_too():
    done = run_stuck(library="PyDLL", hook="saved", own=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "in stuck" in done.stderr
