"""The checks of software, disk, Hub, shared memory and WSL."""

import http.server
import shlex
import shutil
import subprocess
import threading
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
from doctor_machines import GIB

from lowmem_rlhf.doctor import machine as machines
from lowmem_rlhf.doctor import software
from lowmem_rlhf.doctor.machine import Disk, Hub, Machine, ask_hub
from lowmem_rlhf.doctor.software import TESTED_PYTHON, check_packages, check_python, requirements
from lowmem_rlhf.doctor.system import check_disk, check_hub, check_shared_memory, check_wsl

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    ("python", "status"), [((3, 10, 4), "error"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "warning")]
)
def test_python(machine, python, status):
    (finding,) = check_python(machine(python=python))
    assert finding.status == status
    assert finding.command == (None if status == "ok" else "python3.13 -m venv .venv")


def test_the_pythons_are_those_of_the_classifiers():
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.count(".") == 1]
    assert [f"{major}.{minor}" for major, minor in TESTED_PYTHON] == [named[0], named[-1]]


def test_every_dependency_is_checked_against_its_bound_and_what_was_tested():
    assert [str(one) for one in requirements()] == PROJECT["dependencies"]
    tested = software.tested_releases()
    assert len(tested) > 100 and tested["trl"] == "1.16.0" and tested["pyyaml"]


def test_an_installed_package_knows_its_bounds_without_a_checkout(tmp_path):
    names = {one.name.lower().replace("_", "-") for one in requirements(tmp_path)}
    assert {"trl", "torch", "bitsandbytes"} <= names and "pytest" not in names


class Installed(Machine):
    """A machine with these versions, and tested ones of all other libraries."""

    def __init__(self, **versions: str | None) -> None:
        super().__init__()
        self._versions = {name.lower().replace("_", "-"): value for name, value in versions.items()}

    def version(self, package: str) -> str | None:
        name = package.lower().replace("_", "-")
        return self._versions[name] if name in self._versions else software.tested_releases()[name]


@pytest.mark.parametrize(
    ("name", "version", "status", "says", "command"),
    [
        ("trl", "1.15.2", "error", "needs trl>=1.16.0", 'python -m pip install "trl==1.16.0"'),
        ("trl", "1.17.0", "warning", "tested with 1.16.0", 'python -m pip install "trl==1.16.0"'),
        ("trl", "2.0.1", "warning", "TRL 2 drops use_liger_kernel", 'python -m pip install "trl==1.16.0"'),
        (
            "transformers",
            "6.0.0",
            "warning",
            "activation_checkpointing",
            'python -m pip install "transformers==5.23.0"',
        ),
        ("torch", "2.15.0+cu130", "warning", "before Turing", None),
        ("bitsandbytes", None, "error", "needs bitsandbytes>=0.49.0", 'python -m pip install "bitsandbytes==0.50.2"'),
        ("huggingface_hub", "0.34.0", "error", "needs huggingface_hub>=", None),
    ],
)
def test_a_version_out_of_what_is_tested(name, version, status, says, command):
    first, rest = check_packages(Installed(**{name: version}))
    assert first.status == status and says in first.means and name in first.found
    if command:
        assert first.command == command
    assert rest.status == "ok" and f"{name} {version}" not in rest.found


@pytest.mark.parametrize(("name", "version"), [("trl", "1.16.4"), ("rich", "15.9.1"), ("torch", "2.13.1+cu126")])
def test_a_version_that_only_mends_is_fine(name, version):
    (finding,) = check_packages(Installed(**{name: version}))
    assert finding.status == "ok" and f"{name} {version}" in finding.found


def test_a_full_disk(machine, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machines.shutil, "disk_usage", lambda path: usage(100 * GIB, 100 * GIB, GIB // 8))
    monkeypatch.chdir(tmp_path)
    one = machine()
    del one.__dict__["disks"]
    cache, runs = check_disk(one)
    assert cache.status == runs.status == "error" and "0.1 GiB free" in cache.found and "0.1 GiB free" in runs.found
    assert cache.command == "hf cache prune" and runs.command is None
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert check_disk(one)[1].command == "du -sh runs/*"
    subprocess.run("du -sh runs/*", shell=True, check=True, cwd=tmp_path, capture_output=True)
    assert "prune" in subprocess.run([_hf(), "cache", "--help"], capture_output=True, text=True, check=True).stdout


def _hf() -> str:
    return shutil.which("hf") or pytest.skip("the Hub's command is not on the path")


def test_little_room_and_a_folder_that_cannot_be_written(machine):
    disks = (Disk("the cache of models", Path("cache"), 12 * GIB), Disk("runs", Path("runs"), 90 * GIB, "it is a file"))
    cache, runs = check_disk(machine(disks=disks))
    assert cache.status == "warning" and runs.status == "error" and "--output" in runs.means


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def local_hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "status", "command"),
    [
        (200, "ok", None),
        (429, "warning", "hf auth login"),
        (401, "warning", "hf auth login"),
        (503, "warning", "export HF_HUB_OFFLINE=1"),
    ],
)
def test_what_the_hub_answers(machine, local_hub, monkeypatch, code, status, command):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (finding,) = check_hub(machine(hub=ask_hub(f"{local_hub}/{code}", "localhost")))
    assert (finding.status, finding.command) == (status, command)
    assert "2 models in the cache" in finding.found and ("localhost" in finding.found)


def test_a_hub_that_is_not_reached(machine, local_hub, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub = ask_hub("http://127.0.0.1:9/", "localhost")  # the port of `discard`, where nobody listens
    assert hub.code is None and hub.error
    (finding,) = check_hub(machine(hub=hub))
    assert finding.status == "warning" and hub.error in finding.found and "is not reached" in finding.found
    (windows,) = check_hub(machine(hub=hub, system="Windows"))
    assert windows.command == "$Env:HF_HUB_OFFLINE = '1'"
    (proxy,) = check_hub(machine(hub=Hub("hub", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")))
    assert "SSL_CERT_FILE" in proxy.means


@pytest.mark.parametrize(
    ("address", "error"), [("http://me:s3cret@127.0.0.1/", "InvalidURL"), ("s3cret/", "ValueError")]
)
def test_an_address_that_cannot_be_asked_is_a_finding_without_its_password(monkeypatch, address, error):
    escaped: list[object] = []
    monkeypatch.setattr("threading.excepthook", escaped.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ask_hub(address, "the Hub").error == error and escaped == []


@pytest.mark.parametrize(
    ("endpoint", "named"),
    [
        ("https://huggingface.co", "huggingface.co"),
        ("https://me:secret@hub.example:8443/hf", "the Hub that HF_ENDPOINT names"),
    ],
)
def test_a_hub_of_ones_own_is_asked_and_not_named(machine, monkeypatch, endpoint, named):
    asked = []
    monkeypatch.setattr(machines, "ask_hub", lambda *given: asked.append(given) or Hub(given[1], code=200))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    one = machine()
    del one.__dict__["hub"]
    (finding,) = check_hub(one)
    assert asked == [(f"{endpoint}{machines.SMALL_FILE}", named)]
    assert finding.found.startswith(f"{named} answers") and "example" not in finding.found


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_an_offline_machine_asks_nobody(machine, monkeypatch, name):
    monkeypatch.setattr(machines, "ask_hub", lambda *_: pytest.fail("the Hub was asked"))
    one = machine(environment={name: "1"})
    del one.__dict__["hub"]
    (finding,) = check_hub(one)
    assert finding.status == "ok" and f"{name} is set" in finding.found


@pytest.mark.parametrize(
    ("size", "container", "status"),
    [(GIB // 16, True, "warning"), (8 * GIB, True, "ok"), (GIB // 16, False, "ok"), (None, True, None)],
)
def test_shared_memory(machine, size, container, status):
    findings = check_shared_memory(machine(shared_memory=size, in_container=container))
    assert [one.status for one in findings] == ([status] if status else [])
    if status == "warning":
        assert "--shm-size=8g" in shlex.split(findings[0].command or "")


def test_linux_in_windows(machine):
    assert check_wsl(machine()) == []
    (small,) = check_wsl(machine(is_wsl=True, ram_bytes=8 * GIB))
    assert small.status == "warning" and "[wsl2]" in small.means and "page-locked" in small.means
    words = shlex.split(small.command or "")
    assert words[0] == "powershell.exe" and words[-1] == 'notepad "$env:USERPROFILE\\.wslconfig"'
    (large,) = check_wsl(machine(is_wsl=True, ram_bytes=32 * GIB))
    assert large.status == "ok" and "paged optimizers" in large.means
