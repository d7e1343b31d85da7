"""What happens to several processes when memory, the input, the network or one of them gives out."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from process_cases import PAIRS, SLOW, adapter, same_runs
from process_pool import Processes
from tiny_runs import tiny_recipe, write_jsonl

from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train

# Memory runs out in the second process at every so many passes, and once in an optimizer step.
MEMORY_RUNS_OUT = """
import os, torch
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.training.optimizer import Optimizer
if os.environ["RANK"] == "1":
    states, take, passes, steps = SharedBase.states, Optimizer._take, [0], [0]
    def fails(self, batch):
        passes[0] += 1
        if passes[0] % 7 == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states(self, batch)
    def fails_once(self):
        steps[0] += 1
        if steps[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        take(self)
    SharedBase.states, Optimizer._take = fails, fails_once
    SharedBase.plain, Optimizer.plain_take = states, take
"""
MEMORY_IS_BACK = """
import os
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.training.optimizer import Optimizer
if os.environ["RANK"] == "1":
    SharedBase.states, Optimizer._take = SharedBase.plain, Optimizer.plain_take
"""


# Nothing is imported before the processes meet, as in a program of the user's.
FAILS_IN_ONE = """
import os
def reward(completions, **columns):
    if os.environ["RANK"] == "1":
        raise ValueError("this one fails")
    return [float(len(one)) for one in completions]
"""


MOVED = """
import os
from lowmem_rlhf.training.optimizer import Optimizer
Optimizer.plain_take = take = Optimizer._take
def moves(self):
    take(self)
    next(iter(self.parameters.values())).data.add_(1e-3)
if os.environ["RANK"] == "1":
    Optimizer._take = moves
"""
NOT_MOVED = "from lowmem_rlhf.training.optimizer import Optimizer; Optimizer._take = Optimizer.plain_take"


@pytest.mark.parametrize("case", ["grpo_normalized", "ppo", "reward_model", "trl/dpo"])
def test_memory_that_runs_out_in_one_process_changes_nothing(two, alone, tmp_path, case):
    recipe, expected = alone(case)

    two.tell(code=MEMORY_RUNS_OUT)
    said = two.train(recipe, tmp_path / "two")
    two.tell(code=MEMORY_IS_BACK)

    assert said == [{}, {}]
    same_runs(RunDirectory(tmp_path / "two"), expected)


@pytest.mark.parametrize("case", ["grpo", "ppo", "sft"])
def test_a_run_goes_on_in_another_number_of_processes(two, alone, tmp_path, case):
    recipe, whole = alone(case)

    def of_steps(steps):
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": steps})})

    assert two.train(of_steps(2), tmp_path / "run") == [{}, {}]
    train(of_steps(3), tmp_path / "run", resume=True)
    assert two.train(of_steps(5), tmp_path / "run", resume=True) == [{}, {}]

    expected, got = adapter(whole.path), adapter(tmp_path / "run")
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-5


def test_what_one_process_refuses_is_refused_in_all_and_said_once(two, model, tmp_path):
    fine, wrong = tiny_recipe(model), tiny_recipe(model, hardware={"quantization": "int8"})  # in float32

    first, second = two.train([fine, wrong], tmp_path / "run")

    assert first["kind"] == second["kind"] == "UserError"
    assert first["error"] == f"process 1: {second['error']}"
    assert (first["said_elsewhere"], second["said_elsewhere"]) == (False, True)
    assert not (tmp_path / "run").exists()
    assert two.train(fine, tmp_path / "run") == [{}, {}]  # they still know each other


def test_processes_with_other_adapters_are_found_out(two, model, tmp_path):
    two.tell(code=MOVED)
    said = two.train(tiny_recipe(model, training=SLOW), tmp_path / "run")
    two.tell(code=NOT_MOVED)

    assert all("after step 2 the processes do not have the same adapters" in one["error"] for one in said)
    assert [one["said_elsewhere"] for one in said] == [False, True]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"training": {"seed": 1}, "evaluation": {"steps": 2}}, "evaluation.steps, training.seed"),
        ({"data": {"options": {"low": 3}}}, "data.options.low"),
    ],
)
def test_processes_with_other_recipes_are_refused(two, model, tmp_path, changes, keys):
    first, second = two.train([tiny_recipe(model), tiny_recipe(model, **changes)], tmp_path / "run")

    assert f"process 1 was started with another recipe than process 0: {keys}; start all" in first["error"]
    assert (first["said_elsewhere"], second["said_elsewhere"]) == (False, True)


def test_processes_that_read_other_rows_are_refused(two, model, tmp_path):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        write_jsonl(tmp_path / str(rank) / "rows.jsonl", PAIRS[rank:])
    data = {"train": "rows.jsonl", "eval_size": 1, "train_size": None, "prompt": "prompt", "completion": "chosen"}
    sft = {"algorithm": "sft", "grpo": {}, "rewards": [], "sft": {"max_length": 32}}
    recipe = tiny_recipe(model, data={**data, "template": "{prompt}"}, **sft)

    two.tell(code=f"import os; os.chdir(f'{tmp_path}/' + os.environ['RANK'])")
    first, _ = two.train(recipe, tmp_path / "run")
    two.tell(code=f"import os; os.chdir({os.getcwd()!r})")

    assert "process 1 has read other rows of the data than process 0" in first["error"]
    assert not (tmp_path / "run").exists()


def test_a_process_that_fails_ends_the_others_where_it_goes_on_itself(model, tmp_path):
    (tmp_path / "own.py").write_text(FAILS_IN_ONE, encoding="utf-8")
    rewards, training = [{"function": f"{tmp_path / 'own.py'}:reward"}], {**SLOW, "ddp_timeout": 300}
    processes = Processes(2)
    try:
        began = time.monotonic()
        first, second = processes.train(tiny_recipe(model, rewards=rewards, training=training), tmp_path / "run")
    finally:
        processes.end()

    assert time.monotonic() - began < 120
    assert "this process (0 of 2) has lost the others" in first["error"]
    assert "this one fails" in second["error"]


def recipe_file(model, tmp_path, **sections):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(model, **sections).model_dump(exclude_unset=True)), encoding="utf-8")
    return path


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process, seconds=240):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(model, tmp_path):
    file, run = recipe_file(model, tmp_path, training={**SLOW, "max_steps": 10_000}), tmp_path / "run"
    launcher = started("lowmem_rlhf", "train", file, "--output", run, "--processes", 2)
    wait_for(run / "checkpoints" / "step-2", launcher)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2

    workers[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    printed, _ = launcher.communicate(timeout=60)

    assert time.monotonic() - killed < 30
    assert launcher.returncode == 128 + signal.SIGKILL, printed
    assert "error: process 1 of 2 was ended by SIGKILL, and the others with it" in printed
    assert "Traceback" not in printed
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in workers)
    kept = RunDirectory(run).latest_checkpoint()[0]
    assert kept == len(RunDirectory(run).metrics())  # the last finished step was saved
    recipe = tiny_recipe(model, training={**SLOW, "max_steps": kept + 1})
    assert len(train(recipe, run, resume=True).metrics()) == kept + 1


def test_torchrun_starts_a_lost_process_again_and_the_run_goes_on_by_itself(model, tmp_path):
    file, run = recipe_file(model, tmp_path, training={**SLOW, "max_steps": 20}), tmp_path / "run"
    elastic = ["--nnodes", 1, "--nproc-per-node", 2, "--max-restarts", 1, "--rdzv-backend", "c10d"]
    launcher = started("torch.distributed.run", *elastic, "-m", "lowmem_rlhf", "train", file, "--output", run)
    wait_for(run / "checkpoints" / "step-2", launcher)

    psutil.Process(launcher.pid).children()[1].send_signal(signal.SIGKILL)
    printed, _ = launcher.communicate(timeout=240)

    assert launcher.returncode == 0, printed
    assert "going on after step" in printed
    assert [row["step"] for row in RunDirectory(run).metrics()] == list(range(1, 21))


def without_network():
    made = subprocess.run(["ip", "netns", "add", "lowmem-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "lowmem-probe"], capture_output=True, check=False)
    return made.returncode != 0


@pytest.fixture
def two_machines():
    """Two network namespaces with a cable between them; yields their names, the first one's address, and the cable."""
    names, cables = (f"lowmem-a{os.getpid()}", f"lowmem-b{os.getpid()}"), (f"lma{os.getpid()}", f"lmb{os.getpid()}")

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
        ip("netns", "add", name)
        ip("link", "set", cable, "netns", name)
        ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", cable)
        ip("-n", name, "link", "set", cable, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names, "10.77.0.1", cables
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False)


def on_machines(names, address, cables, *arguments):
    """Start a process on each machine, as two machines' launchers would."""
    where = {"MASTER_ADDR": address, "MASTER_PORT": "29555", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "lowmem_rlhf", "train", *map(str, arguments)],
            env={**os.environ, **where, "RANK": str(rank), "GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (name, cable) in enumerate(zip(names, cables, strict=True))
    ]


@pytest.mark.skipif(not Path("/usr/sbin/ip").exists() or without_network(), reason="no network namespaces here")
def test_a_slow_network_slows_and_one_that_is_cut_ends_the_run_with_a_sentence(model, tmp_path, two_machines):
    names, address, cables = two_machines
    training = {**SLOW, "max_steps": 10_000, "ddp_timeout": 8}
    file, run = recipe_file(model, tmp_path, training=training), tmp_path / "run"
    machines = on_machines(names, address, cables, file, "--output", run)
    wait_for(run / "checkpoints" / "step-2", machines[0])
    slow = ["tc", "-n", names[0], "qdisc", "add", "dev", cables[0], "root", "tbf"]  # a slow link slows, and no more
    subprocess.run([*slow, "rate", "2mbit", "burst", "16kb", "latency", "400ms"], check=True)
    wait_for(run / "checkpoints" / "step-6", machines[0])

    subprocess.run(["ip", "-n", names[1], "link", "set", cables[1], "down"], check=True)
    cut = time.monotonic()
    said = [one.communicate(timeout=120)[0] for one in machines]

    assert time.monotonic() - cut < 60
    for rank, (one, text) in enumerate(zip(machines, said, strict=True)):
        assert one.returncode == 1, text
        assert re.search(rf"error: .*this process \({rank} of 2\) has lost the others", text)
        assert "go on with --resume" in text
        assert "Traceback" not in text
    kept = RunDirectory(run).latest_checkpoint()[0]
    assert kept >= 2
    assert f"step {kept} is kept" in said[0]
