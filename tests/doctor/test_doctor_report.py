"""The whole of ``doctor``: a real 4-bit product, a library that is missing, and a report without secrets."""

import getpass
import json
import os
import sys
from pathlib import Path

import bitsandbytes
import pytest
from doctor_machines import CPU_TORCH, RIGHT

from lowmem_rlhf.doctor import probe, run
from lowmem_rlhf.doctor.finding import Finding
from lowmem_rlhf.doctor.four_bit import check_bitsandbytes
from lowmem_rlhf.doctor.machine import Machine
from lowmem_rlhf.doctor.private import environment, without_secrets
from lowmem_rlhf.doctor.run import CHECKS, examine, report
from lowmem_rlhf.doctor.show import print_findings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def without_library(tmp_path_factory) -> Path:
    """Return a folder with bitsandbytes as it is installed, but for its compiled libraries."""
    there = Path(bitsandbytes.__file__).parent
    package = tmp_path_factory.mktemp("packages") / "bitsandbytes"
    package.mkdir()
    for entry in there.iterdir():
        if entry.suffix not in (".so", ".dll", ".dylib"):
            if entry.name == "__init__.py" or entry.suffix == ".py":
                (package / entry.name).write_bytes(entry.read_bytes())  # a link would lead to the libraries beside it
            else:
                (package / entry.name).symlink_to(entry)
    return package.parent


def test_this_machine(lowmem_rlhf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    monkeypatch.setenv("HTTPS_PROXY", "http://somebody:secret@proxy.example:3128")
    done = lowmem_rlhf("doctor", "--json", "--device", "cpu")
    told = json.loads(done.out)
    errors = [one for one in told["findings"] if one["status"] == "error"]
    assert done.code == int(bool(errors)) == int(told["status"] == "error")
    assert set(told["findings"][0]) == {"check", "status", "found", "means", "command"}
    assert list(dict.fromkeys(one["check"] for one in told["findings"])) == [
        name for name in CHECKS if any(one["check"] == name for one in told["findings"])
    ]
    (product,) = [one for one in told["findings"] if one["check"] == "bitsandbytes"]
    assert product["status"] == "ok" and "a 4-bit product in bfloat16" in product["found"]
    assert told["bitsandbytes"]["rounding"]["1"] < 0.01 < told["bitsandbytes"]["quantization"] < 0.15
    assert told["versions"]["trl"] and told["environment"]["HF_TOKEN"] == "set"
    for secret in ("hf_abcdef", "somebody", "proxy.example", str(Path.home()), str(tmp_path), sys.prefix):
        assert secret not in done.out, secret


def test_a_library_that_is_missing(machine, without_library):
    told = probe.ask("cpu", "bfloat16", {**os.environ, "PYTHONPATH": f"{without_library}{os.pathsep}{ROOT}"})
    assert told["bitsandbytes"]["library_error"] and told["bitsandbytes"]["error"] is None
    (on_cpu,) = check_bitsandbytes(machine(four_bit=told["bitsandbytes"]))
    assert on_cpu.status == "warning" and "slow kernels in Python" in on_cpu.means
    (on_card,) = check_bitsandbytes(
        machine(
            four_bit={
                "version": "0.50.2",
                "error": "CUDA SETUP ERROR: Missing dependency: libnvJitLink.so.13",
                "library_error": "libnvJitLink.so.13: cannot open shared object file: No such file or directory",
            },
            torch={**CPU_TORCH, "cuda": "13.0"},
        )
    )
    assert on_card.status == "error" and "libnvJitLink.so.13: cannot open" in on_card.found
    command = f'python -m pip install --force-reinstall --no-deps "bitsandbytes=={told["bitsandbytes"]["version"]}"'
    assert on_cpu.command == on_card.command == command


def test_bitsandbytes_that_is_not_there_computes_wrongly_or_was_not_tried(machine):
    (missing,) = check_bitsandbytes(machine(four_bit={"error": "No module named 'bitsandbytes'", "version": None}))
    assert missing.status == "error" and missing.command and "bitsandbytes" in missing.command
    for wrong in ({"rounding": {"1": 0.002, "16": 0.9}}, {"rounding": {"1": float("nan")}}, {"quantization": 1.0}):
        (finding,) = check_bitsandbytes(machine(four_bit={**RIGHT, **wrong}))
        assert finding.status == "error" and "computes wrongly" in finding.found
    (crashed,) = check_bitsandbytes(machine(four_bit={"error": "it crashed (SIGSEGV)", "version": "0.50.2"}))
    assert crashed.status == "error" and "SIGSEGV" in crashed.found
    (unreached,) = check_bitsandbytes(machine(torch={**CPU_TORCH, "unreachable": "Torch not compiled with CUDA"}))
    assert unreached.status == "warning" and "not tried" in unreached.found


@pytest.mark.parametrize(
    ("program", "torch_error", "four_bit_error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)", "crashed (SIGSEGV)"),
        ("raise OSError('libgomp.so.1: not found')", "code 1: OSError: libgomp", "code 1: OSError: libgomp"),
        (f'print({probe.MARK!r} + \'{{"torch": {{"error": null}}}}\'); raise SystemExit(3)', None, "code 3"),
    ],
)
def test_a_process_that_ends_early_says_how(monkeypatch, program, torch_error, four_bit_error):
    monkeypatch.setattr(probe, "COMMAND", (sys.executable, "-S", "-c", program))
    told = probe.ask("cpu", "float16")
    for name, error in (("torch", torch_error), ("bitsandbytes", four_bit_error)):
        assert (told[name]["error"] is None) == (error is None)
        assert error is None or error in told[name]["error"]


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(probe, "COMMAND", (sys.executable, "-S", "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(probe, "SECONDS", 0.2)
    assert "did not end within" in probe.ask("cpu", "float16")["torch"]["error"]


def test_a_check_that_fails_itself_costs_the_others_nothing(machine, monkeypatch):
    def broken(_: Machine) -> list[Finding]:
        raise ZeroDivisionError("of the check")

    monkeypatch.setitem(run.CHECKS, "disk", broken)
    findings = examine(machine())
    (failed,) = [one for one in findings if one.check == "disk"]
    assert failed.status == "error" and "ZeroDivisionError: of the check" in failed.found
    assert {one.check for one in findings} >= {"device", "driver", "torch", "bitsandbytes", "packages", "hub"}


def test_a_machine_in_good_order_has_nothing_to_mend(machine, capsys):
    findings = examine(machine("cpu"))
    assert {one.status for one in findings} == {"ok"}, [one for one in findings if one.status != "ok"]
    print_findings(findings)
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to mend"
    assert report(machine("cpu"), findings)["status"] == "ok"


def test_what_is_printed_wraps_and_leaves_commands_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = 'python -m pip install "torch==2.13.0+cu130" --index-url https://download.pytorch.org/whl/cu130'
    print_findings([Finding("torch", "error", "built for the CPU " * 8, "it cannot use the card " * 8, command)])
    *lines, last = capsys.readouterr().out.splitlines()
    assert f"         $ {command}" in lines and "1 error; for a report of a bug" in last
    assert all(len(line) <= 80 for line in lines if command not in line) and len(lines) > 4


def test_an_impossible_device_is_the_users_error(lowmem_rlhf):
    done = lowmem_rlhf("doctor", "--device", "cuda:x")
    assert done.code == 2 and "is not a device" in done.err


def test_secrets_stay_here(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "marieke")
    text = (
        "cannot open /home/marieke/models/x.safetensors of marieke with hf_AbCdEfGhIjKlMnOp at "
        "https://marieke:pass@hub.example/x, GPU-8a1b2c3d-1111-2222-3333-444455556666; mount -o size=8g /dev/shm"
    )
    told = without_secrets({"a": [text], "b": 0.1234567891, "cards": [{"name": "a card", "uuid": "8a1b"}]})
    assert told["cards"] == [{"name": "a card"}]
    assert without_secrets("process 17 (secret_project) 900 MiB") == "process 17 900 MiB"
    assert told["a"] == [
        "cannot open x.safetensors of USER with TOKEN at https://hub.example/x, GPU-...; mount -o size=8g /dev/shm"
    ]
    given = {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "PYTORCH_ALLOC_CONF": "/home/marieke/x",
        "HF_TOKEN": "hf_secret",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    assert environment(given) == {"CUDA_VISIBLE_DEVICES": "0,1", "PYTORCH_ALLOC_CONF": "set", "HF_TOKEN": "set"}


def test_a_device_that_torch_cannot_tell_of_is_a_finding(monkeypatch):
    def broken(_: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("lowmem_rlhf.doctor.machine.detect", broken)
    one = Machine("xpu")
    assert one.device.on_cpu and "libcudart.so.13" in one.device_problem
