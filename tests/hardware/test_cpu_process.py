"""The process on a CPU: kernels that oneDNN keeps are bounded, and a step's peak is told."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lowmem_rlhf.hardware import cpu_process, memory

CPU = torch.device("cpu")
MIB = 2**20
needs_linux = pytest.mark.skipif(cpu_process.peak_bytes() is None, reason="the system does not tell a process's peak")


def test_the_users_own_bound_is_kept(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    cpu_process.bound_kernel_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(cpu_process.KERNELS)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # undone afterwards


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
COMMAND = "import sys; sys.argv = ['lowmem-rlhf', '--version']\nfrom lowmem_rlhf.cli import main\nmain()"


@pytest.mark.parametrize(
    ("code", "own", "seen"),
    [
        (COMMAND, {}, {"OMP_WAIT_POLICY": "passive"}),
        (COMMAND, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        (COMMAND, {"GOMP_SPINCOUNT": "1000"}, {"GOMP_SPINCOUNT": "1000"}),
        (COMMAND, {"KMP_BLOCKTIME": "50"}, {"KMP_BLOCKTIME": "50"}),
        ("import lowmem_rlhf, lowmem_rlhf.cli", {}, {}),
    ],
)
def test_the_command_line_lets_threads_sleep_where_the_user_has_not_chosen(code, own, seen):
    tell = (
        "import atexit, json, os, sys\n"
        "atexit.register(lambda: print(json.dumps([dict(os.environ), 'torch' in sys.modules])))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | own
    done = subprocess.run(
        [sys.executable, "-c", tell + code], capture_output=True, text=True, check=True, env=environment
    )
    left, torch_is_there = json.loads(done.stdout.splitlines()[-1])
    assert not torch_is_there
    assert {name: value for name, value in left.items() if name in WAITING} == seen


@needs_linux
def test_a_process_does_not_grow_with_every_new_shape():
    """700 products of bf16 matrices, no two of one shape, in a process that keeps 64 kernels and in one that keeps all.

    torch is imported before the bound is set, as a program that calls `train` may have done.
    """
    code = (
        "import os, sys, torch\n"
        "from lowmem_rlhf.hardware import cpu_process\n"
        "cpu_process.KERNELS = int(sys.argv[1])\n"
        "cpu_process.bound_kernel_caches()\n"
        "torch.set_num_threads(1)\n"
        "weight = torch.ones(256, 64, dtype=torch.bfloat16, device='cpu')\n"
        "def multiply(shapes):\n"
        "    for rows in shapes:\n"
        "        torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16, device='cpu'), weight)\n"
        "multiply(range(1, 101))\n"
        "before = cpu_process._status('VmRSS')\n"
        "multiply(range(101, 801))\n"
        "print(cpu_process._status('VmRSS') - before)\n"
    )
    kept = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    grown = {}
    for kernels in (1024, 64):
        done = subprocess.run(
            [sys.executable, "-c", code, str(kernels)], capture_output=True, text=True, check=True, env=kept
        )
        grown[kernels] = int(done.stdout)
        if grown[1024] < 40 * MIB:
            pytest.skip(f"this CPU's kernels are small: 700 take {grown[1024] / MIB:.0f} MiB")
    assert grown[64] < grown[1024] / 4


@needs_linux
def test_the_peak_of_a_step_is_the_peak_and_not_what_is_left():
    memory.reset_peak(CPU)
    before = memory.peak_bytes(CPU)
    torch.ones(256 * MIB, dtype=torch.uint8, device=CPU)
    peak = memory.peak_bytes(CPU)
    assert peak > before + 192 * MIB
    memory.release(CPU)  # where a heap that is full of holes has lent the block, it keeps it
    memory.reset_peak(CPU)
    assert memory.peak_bytes(CPU) < peak - 128 * MIB


@needs_linux
def test_what_is_free_goes_back_to_the_system():
    """Blocks of 64 KiB come from the heap, and every other one stays, so nothing can be given back from its end."""
    blocks = [torch.ones(64 * 1024, dtype=torch.uint8, device=CPU) for _ in range(1000)]
    held = blocks[::2]
    del blocks
    before = cpu_process._status("VmRSS")
    memory.release(CPU)
    assert len(held) == 500 and cpu_process._status("VmRSS") < before - 16 * MIB
