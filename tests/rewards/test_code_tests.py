"""The reward `code_tests`: what passes, what does not, and that code that misbehaves harms nothing outside."""

import json
import os
import signal
import sys
import tempfile
import threading
import time

import psutil
import pytest

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.parallel import Ending, in_parallel
from lowmem_rlhf.recipe.sections import RewardConfig
from lowmem_rlhf.rewards import code_tests as module
from lowmem_rlhf.rewards import load_rewards, score
from lowmem_rlhf.rewards.code_cases import cases_of
from lowmem_rlhf.rewards.code_tests import code_of
from lowmem_rlhf.rewards.references import _reader

SQUARE = "def f(x):\n    return x * x\n"
TESTS = ["assert f(2) == 4", "assert f(3) == 9"]
LEAVES = (
    "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(1000)\n  os._exit(0)\n"
)
WITHOUT_NAMESPACES = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("runner", {runner!r})
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
runner._own_namespaces = lambda: False
runner.main()
"""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Look after each test that no folder and no process is left."""
    (place := tmp_path / "programs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    before = psutil.Process().children(recursive=True)  # what libraries have begun for other tests
    yield place
    assert not list(place.iterdir())
    now = psutil.Process().children(recursive=True)
    assert not [one for one in now if one not in before and one.status() != psutil.STATUS_ZOMBIE]
    assert not marked(place)


def marked(place):
    """Return the processes, of whatever parent, that run with a home in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            found += [process] if process.environ().get("HOME", "").startswith(str(place)) else []
        except psutil.Error:
            continue
    return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def no_namespaces(tmp_path, monkeypatch):
    """Let programs be run as on a system that gives them no namespaces."""
    (runner := tmp_path / "runner.py").write_text(WITHOUT_NAMESPACES.format(runner=str(module._RUNNER)))
    monkeypatch.setattr(module, "_RUNNER", runner)


def reward(**options):
    return load_rewards([RewardConfig(function="code_tests", options={"timeout": 20.0, "memory": 512, **options})])[0]


def values(codes, tests=TESTS, **options):
    one = reward(**options)
    one.function.tried = True
    return one.function([f"So:\n```python\n{code}\n```\n" for code in codes], tests=[tests] * len(codes))


def test_all_or_a_fraction_of_the_tests():
    codes = [SQUARE, "def f(x): return x + x", "def f(x): return x +", "", SQUARE]
    assert values(codes) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert values(codes, score="fraction") == [1.0, 0.5, 0.0, 0.0, 1.0]
    stops = "import os\ndef f(x): return x * x if x == 3 else os._exit(0)"
    assert values([stops], score="fraction") == [0.5]  # each test has a process of its own


def test_the_forms_of_tests():
    one = reward().function
    rows = [
        "\n".join(TESTS),
        TESTS,
        None,
        "",
        [],
        [1],
        "for x in range(9):\n    assert f(x) == x**2\nassert g",
        ["x ="],
    ]
    assert one([SQUARE] * 8, tests=rows) == [1.0, 1.0, None, None, None, None, 0.0, 0.0]
    check = "def check(candidate):\n    assert candidate(2) == math.sqrt(16)\n"  # as in HumanEval
    options = {"column": "test", "setup": "imports", "entry_point": "name"}
    human = reward(**options).function
    columns = {"test": [check] * 4, "imports": ["import math", ["import os", "import math"], "", "import math"]}
    assert human([SQUARE] * 4, **columns, name=["f", "f", "f", None]) == [1.0, 1.0, 0.0, None]
    assert human.columns == ("test", "imports", "name")
    reader = _reader(reward())
    assert [reader.reads({}, value) for value in rows] == [True, True, False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("value", "cases"),
    [
        ({"inputs": ["1\n", "2"], "outputs": ["a", ["b", "c"]], "fn_name": None}, [("1\n", "a"), ("2", "b\nc")]),
        ({"input": [["1", "2"]], "output": ["3"]}, [("1\n2", "3")]),
        ([{"input": "", "output": "1", "testtype": "stdin"}, {"input": "2", "output": ""}], [("", "1"), ("2", "")]),
        ([{"input": "[1]", "output": "1", "testtype": "functional"}], []),
        ({"inputs": [[1]], "outputs": [1], "fn_name": "f"}, []),
        ({"inputs": ["1"], "outputs": []}, []),
        ({"inputs": [], "outputs": []}, []),
        ({"input": "1", "output": "1"}, []),
        ([{"input": "1", "output": "1"}, {"input": 1, "output": "1"}], []),
        (["assert f(1)"], []),
        (None, []),
    ],
)
def test_the_forms_of_cases(value, cases):
    assert cases_of(value) == cases_of(json.dumps(value)) == cases
    assert reward().function.reads(value) is bool(cases or value == ["assert f(1)"])


def test_json_text_is_never_a_test_that_passes_by_itself():
    rows = [
        json.dumps(TESTS),
        '{"fn_name": "f", "inputs": [[2]], "outputs": [5]}',
        "[]",
        '[{"testtype": "functional"}]',
    ]
    one = reward().function
    one.tried = True
    rows.append(['{"input": "2", "output": "5"}'])
    assert one(["def f(x): return x", *[SQUARE] * 4], tests=rows) == [0.0, None, None, None, None]
    assert one([SQUARE], tests=rows[:1]) == [1.0]


ADDS = [{"input": "1 2\n", "output": "3\n"}, {"input": "-4 4", "output": "0"}, {"input": "0.5 0.5", "output": "1.0"}]
PROGRAMS = {  # each with the share of the cases that it passes
    "a, b = input().split()\nprint(eval(a + '+' + b))": 1.0,
    "if __name__ == '__main__':\n  a = open(0).read().split()\n  print(eval('+'.join(a)), '\\n')": 1.0,
    "import sys\nsys.stdout.buffer.write(b'3 \\r\\n\\n')\nsys.exit()": 1 / 3,
    "import threading\ndef f(): print(sum(map(int, input().split())))\nthreading.Thread(target=f).start()": 2 / 3,
    "import atexit, sys\natexit.register(print, 1.0)\nsys.exit('' if sys.stdin.read(1) == '0' else 1)": 1 / 3,
    "print(0)\nimport os, sys\nsys.stdout.flush()\nif '4' in input(): os._exit(0)": 1 / 3,
    "print(3)\n1 / 0": 0.0,
    "print('3.0' if input() == '1 2' else 0)": 1 / 3,
    "print(' 0')": 0.0,
    "import os\nx = input()\nif x == '1 2':\n  while True: os.write(1, bytes(2**20))\nprint(0)": 1 / 3,
    "x = input()\nif x == '1 2': bytearray(2**30)\nprint(0)": 1 / 3,
    "import sys\nf = sys._getframe().f_back\nassert not any(chr(45) in str(v) for v in f.f_back.f_locals.values())\n"
    "print(0)": 1 / 3,
    "print(3 if input() == '1 2' else '0' + ' ' * 2**21)": 1 / 3,  # more than is read
    "def f(": 0.0,
}


def test_programs_that_read_their_input_and_print():
    found = values(PROGRAMS, ADDS, score="fraction", case_timeout=20.0)
    assert dict(zip(PROGRAMS, found, strict=True)) == PROGRAMS
    adds, *_, broken = PROGRAMS
    assert values([adds, "print(3)", broken], json.dumps(ADDS)) == [1.0, 0.0, 0.0]
    large = "x" * 2**20  # more than a pipe holds, both ways
    echo = [{"input": large, "output": large}]
    assert values(["print(input())", "print('x' * 2**20)", "print(0)"], echo) == [1.0, 1.0, 0.0]


def test_a_case_has_a_time_limit_of_its_own():
    waits = "import time\nif input() == '1 2': time.sleep(1000)\nprint(0)"
    assert values([waits], ADDS, score="fraction", case_timeout=2.0) == [1 / 3]
    codes = [waits, LEAVES + "print(3)"]  # what the other one leaves holds its output open
    assert values(codes, ADDS[:1], case_timeout=0.3) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```\nand\n```python\nb\n```\n```text\nc\n```", "b\n"),
        ("```\na\n```\n```Python3 title\nb\n```\n```\nc\n```", "b\n"),
        ("```\na\n```\n```json\nb\n```", "a\n"),
        ("<think>```python\na\n```</think>x = 1", "x = 1"),
        ("- so\n  ```py\n  if a:\n      b\n  ```", "if a:\n    b\n"),
        ("x = 1", "x = 1"),
        ("```python\nx = 1", "```python\nx = 1"),
    ],
)
def test_where_the_code_stands(text, code):
    assert code_of(text) == code


def test_code_that_can_do_what_code_can():
    assert (
        values(
            [
                "import dataclasses, typing\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
                "def f(x): return A(x).x ** 2 if typing.get_type_hints(A) else 0",
                "def f(x): return x * x\nif __name__ == '__main__': f(input())",
                "import subprocess\ndef f(x): return int(subprocess.getoutput(f'echo $(({x}*{x}))'))",
                "import multiprocessing.pool as m\ndef f(x): return m.ThreadPool(2).map(lambda x: x * x, [x])[0]",
                "open('note', 'w').write('2')\ndef f(x): return x ** int(open('note').read())",
            ]
        )
        == [1.0] * 5
    )


CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "_exit": "import os; os._exit(0)",
    "exit in the function": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "prints": "print('passed', True, '{\"passed\": [true, true]}')\nimport os; os.write(1, b'd'); os._exit(0)",
    "writes everywhere": "import os\nfor n in range(99):\n  try: os.write(n, b'rd' + b'0' * 99)\n  except OSError: 0\n",
    "writes what it likes": "import os\nfor n in range(3, 99):\n  try: os.write(n, b'r' * 17)\n  except OSError: 0\n",
    "builtins": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: 0\ndef f(x): return 0",
    "own builtins": "__builtins__ = {'f': lambda x: x * x}\n",
    "no assertions": "import builtins\nAssertionError = builtins.AssertionError = None\ndef f(x): return 0",
    "print": "print = lambda *a: 'ok'\ndef f(x): return print(x)",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "sees": "import gc\nassert any('f(' + str(2) in str(o) for o in gc.get_objects() if type(o) in (list, dict))\n"
    + SQUARE,
    "environment": "import os\nassert any('secret' in one for one in os.environ.values())\n" + SQUARE,
}


def test_nothing_passes_that_does_not_run_to_the_end_of_the_tests(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert dict(zip(CHEATS, values(CHEATS.values()), strict=True)) == dict.fromkeys(CHEATS, 0.0)
    jumps = "def t(f, e, a):\n  if e == 'line' and f.f_code.co_filename == '<test>': f.f_lineno = 3\n  return t\n"
    tests = "x = 1\nassert f(x)\nx = 2"
    assert values([f"import sys\n{jumps}sys.settrace(t)\ndef f(x): return 0", "def f(x): return 1"], tests) == [
        0.0,
        1.0,
    ]
    assert values(["import builtins\nbuiltins.all = lambda x: True\ndef f(x): return 0"], "assert all([f(0)])") == [0.0]


HARMLESS = {
    "memory": "x = bytearray(2**30)\n" + SQUARE,
    "signal": "import os; os.kill(os.getpid(), 11)",
    "crash": "import ctypes; ctypes.string_at(0)",
    "recursion": "def f(x): return f(x)",
    "closed files": "import os\nos.closerange(0, 4096)\n" + SQUARE,
    "no folder": "import os, shutil\nshutil.rmtree(os.getcwd(), True)\nos.getcwd()",
    "large file": "with open('x', 'wb') as file: file.write(bytes(2**25))\n" + SQUARE,
    "locked folders": "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.chmod('a/b', 0); os.chmod('a', 0); 1 / 0",
    "deep folders": "import os\nfor n in range(1000): os.mkdir('a'); os.chdir('a')\nraise ValueError",
    "null": "\0",
    "no text": "'\ud800'",
}


def test_code_that_misbehaves_harms_nothing():
    codes = {**HARMLESS, "output": "import os\nfor n in range(64): os.write(1, bytes(2**24))\n" + SQUARE}
    found = dict(zip(codes, values(codes.values()), strict=True))
    assert found == {**dict.fromkeys(HARMLESS, 0.0), "output": 1.0}  # nothing of it is kept


def test_what_is_over_its_time_is_ended_with_all_its_processes():
    hangs = [
        "while True: pass",
        "import time; time.sleep(1000)",
        LEAVES + "time.sleep(1000)",
        "import os\nfor n in range(6): os.fork()\nwhile 1: pass",
    ]
    hangs += ["import signal, time\nfor n in (2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile 1: time.sleep(9)"]
    assert values(hangs, timeout=0.7, memory=128, workers=5) == [0.0] * 5


@pytest.mark.skipif(sys.platform != "linux", reason="processes that leave their group are found on Linux alone")
def test_without_namespaces_nothing_is_left_either(no_namespaces, monkeypatch):
    said = []
    monkeypatch.setattr(module, "message", said.append)
    codes = [LEAVES + SQUARE, SQUARE, LEAVES + "while 1: pass", LEAVES + "os.kill(os.getppid(), 9)\ntime.sleep(1000)"]
    codes += ["import os\nos.killpg(os.getpgid(os.getppid()), 9)\nimport time; time.sleep(1000)"]
    one = reward(timeout=2.0, workers=5).function
    assert one(codes, tests=[TESTS] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    one([SQUARE], tests=[TESTS])
    assert values([LEAVES + "print(3)"], ADDS[:1], case_timeout=0.5) == [0.0]
    assert len(said) == 1 and "can use the network and signal your processes" in said[0]


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_in_namespaces_the_run_cannot_be_signalled():
    one = reward()
    outcome = one.function._run(module._Program("", "", ("assert True",)), Ending())
    if not outcome.isolated:
        pytest.skip("this system gives programs no namespaces")
    port = "import socket\nsocket.create_connection(('127.0.0.1', 1))"
    kills = f"import os\ntry: os.kill({os.getpid()}, 15)\nexcept ProcessLookupError: pass\n" + SQUARE
    assert values([kills, LEAVES + SQUARE, "import os; os.kill(os.getppid(), 9)\n" + SQUARE, port]) == [1.0] * 3 + [0.0]


def test_a_run_that_is_stopped_leaves_no_process(folders):
    def stop():
        while len(marked(folders)) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    one = reward(timeout=600.0, workers=2)
    one.function.tried = True
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        score([one], ["p"] * 4, [LEAVES + f"{n}\nwhile 1: pass" for n in range(4)], [[1]] * 4, {"tests": [TESTS] * 4})


def test_a_system_that_runs_no_programs_is_an_error_and_not_a_zero(monkeypatch, tmp_path):
    (broken := tmp_path / "broken.py").write_text("raise SystemExit('no such thing')")
    monkeypatch.setattr(module, "_RUNNER", broken)
    with pytest.raises(RunError, match=r"^reward function code_tests: programs cannot be run here: no such thing$"):
        score([reward()], ["p"], [SQUARE], [[1]], {"tests": [TESTS]})
    monkeypatch.delattr(os, "fork")
    with pytest.raises(UserError, match="so it runs none: run it there, or in WSL"):
        reward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0.0}, "timeout: got 0; give a number of seconds above 0"),
        ({"case_timeout": 4000.0}, "case_timeout: got 4000; give a number of seconds above 0 and up to 3600"),
        ({"memory": 1}, "memory: got 1; give a number of MiB from 64"),
        ({"workers": 0}, "workers: got 0; give a whole number from 1"),
        ({"score": "some"}, "score: got 'some'; give 'all' or 'fraction'"),
        ({"setup": ""}, "column: got ''; name a column of the data"),
    ],
)
def test_what_the_options_of_code_refuse(options, message):
    with pytest.raises(UserError) as caught:
        reward(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_work_in_parallel_is_bounded_in_order_and_ended_by_an_error():
    active, most, lock = [0], [0], threading.Lock()

    def work(item, ending):
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        time.sleep(0.001)
        with lock:
            active[0] -= 1
        return item * 2

    assert in_parallel(work, list(range(40)), 3) == [2 * n for n in range(40)] and most[0] <= 3
    assert in_parallel(work, [], 3) == []
    ended = []

    def waits(item, ending):
        if item == 0:
            raise ValueError("zero")
        over = threading.Event()
        with ending.by(over.set):
            assert over.wait(60)
        ended.append(item)

    with pytest.raises(ValueError, match="zero"):
        in_parallel(waits, [1, 0, 2, 3], 2)
    assert ended == [1]
