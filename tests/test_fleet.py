"""examples/fleet: the batch script, with stand-ins for Slurm's commands that write down what they are called with."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from lowmem_rlhf.cli import app

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "fleet" / "slurm.sh"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a batch script of Slurm is bash's")
# Slurm's answer has a line for each node, and more than a pipe to a reader of one line takes
STAND_INS = {
    "scontrol": '[ "$*" = "show hostnames node[7-9999]" ] && for n in $(seq 7 9999); do echo "node$n"; done',
    "srun": 'printf "%s\\0" "$@" > srun.txt',
    "python": 'printf "%s\\0" "$@" > python.txt',
}


@dataclass
class Place:
    """A folder with the stand-ins, where the script is run."""

    folder: Path

    def bash(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        job = {"SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[7-9999]", "SLURM_JOB_NUM_NODES": "3"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        everything = {**os.environ, **job, **environment, "PATH": path}
        return subprocess.run(["bash", *words], cwd=self.folder, env=everything, capture_output=True, text=True)

    def words(self, name: str) -> list[str]:
        return (self.folder / f"{name}.txt").read_text().removesuffix("\0").split("\0")


@pytest.fixture
def place(tmp_path) -> Place:
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    return Place(tmp_path)


def test_the_script_is_bash(place):
    assert place.bash("-n", str(SCRIPT)).returncode == 0


def test_each_node_runs_torchrun_with_a_rendezvous_that_it_understands(place):
    from torch.distributed.run import config_from_args, get_args_parser

    done = place.bash(str(SCRIPT), "grpo_gsm8k", "shared/run", "a=[x, y z]", PROCESSES_PER_NODE="2", FEWEST_NODES="2")
    assert done.returncode == 0, done.stderr
    words = place.words("srun")
    at = words.index("torchrun")
    assert set(words[:at]) == {"--no-kill", "--kill-on-bad-exit=0", "--wait=0"}  # one lost node ends nothing
    config, command, arguments = config_from_args(get_args_parser().parse_args(words[at + 1 :]))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 3, 2, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "node7:20123", "40123")
    assert (command, arguments[0]) == ("bash", "-c")
    assert arguments[2:] == ["worker", "grpo_gsm8k", "shared/run", "a=[x, y z]"]


def test_what_is_not_said_is_one_process_a_card_and_any_node_left(place):
    assert place.bash(str(SCRIPT), "grpo_gsm8k", "shared/run").returncode == 0
    assert {"--nnodes=1:3", "--nproc-per-node=gpu"} <= set(place.words("srun"))
    done = place.bash(str(SCRIPT), "grpo_gsm8k")
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch slurm.sh RECIPE SHARED/run")


def test_a_process_goes_on_where_there_is_a_run(place):
    assert place.bash(str(SCRIPT), "grpo_gsm8k", "shared/a run", "training.max_steps=3").returncode == 0
    words = place.words("srun")
    worker = words[words.index("bash") + 1 :]
    plain = ["-m", "lowmem_rlhf", "train", "grpo_gsm8k", "--output", "shared/a run", "training.max_steps=3"]
    assert place.bash(*worker).returncode == 0 and place.words("python") == plain
    (place.folder / "shared" / "a run").mkdir(parents=True)
    assert place.bash(*worker).returncode == 0 and place.words("python") == plain  # nothing was begun there
    (place.folder / "shared" / "a run" / "recipe.yaml").touch()
    assert place.bash(*worker).returncode == 0 and place.words("python") == [*plain, "--resume"]
    train = typer.main.get_command(app).commands["train"]
    taken = train.make_context("train", place.words("python")[3:]).params
    assert (taken["recipe"], taken["output"], taken["resume"]) == ("grpo_gsm8k", Path("shared/a run"), True)
    assert taken["overrides"] == ["training.max_steps=3"]
