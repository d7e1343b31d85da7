"""Processes that stay for several runs, so that torch is imported once in each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Processes:
    """Processes that run what they are told, all at once."""

    def __init__(self, size):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        self.started = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("process_worker.py"))],
                env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def tell(self, **job):
        """Have every process do a job; return what each says at its end."""
        for one in self.started:
            one.stdin.write(json.dumps(job) + "\n")
            one.stdin.flush()
        lines = [one.stdout.readline() for one in self.started]
        assert all(lines), "a process has ended"
        return [json.loads(line) for line in lines]

    def train(self, recipe, output, resume=False):
        """Run a recipe (or a list of one for each process); return what each process says at its end."""
        plain = [one.model_dump() for one in recipe] if isinstance(recipe, list) else recipe.model_dump()
        return self.tell(recipe=plain, output=str(output), resume=resume)

    def end(self):
        for one in self.started:
            one.stdin.close()
        for one in self.started:
            one.wait(timeout=60)
